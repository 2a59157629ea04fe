"""How fast this machine trains, samples, starts and rolls out, against its own limits and against PyTorch."""
