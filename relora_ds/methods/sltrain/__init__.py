"""SLTrain: a low-rank product plus a sparse matrix on a fixed support."""
