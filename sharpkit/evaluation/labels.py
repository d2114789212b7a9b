"""How the statistics of an evaluation are called in figures and reports."""

LABELS = {
    "cmi_pgdl": "mutual information, PGDL",
    "cmi_jiang": "mutual information, Jiang",
    "kendall_tau": "Kendall’s τ",
    "kendall_tau_b": "Kendall’s τ-b",
    "granulated_kendall": "granulated Kendall",
    "spearman": "Spearman’s ρ",
    "pearson": "Pearson’s r",
    "r_squared": "R², held out",
    "sign_error": "sign-error, mean",
    "sign_error_90": "sign-error, 90 %",
    "sign_error_max": "sign-error, worst",
}
