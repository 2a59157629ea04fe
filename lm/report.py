def write(root): return root
