"""Readers of the files that data sets come in: CIFAR, SVHN, IDX, .npz, .mat, images."""
