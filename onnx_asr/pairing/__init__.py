"""Dense and pruned graph: which node and which tensor of one corresponds to which of the other."""
