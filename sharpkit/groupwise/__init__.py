"""The floor of all work on groups of examples: m-sharpness and m-SAM stand on it alike."""
