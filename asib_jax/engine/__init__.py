"""How it is run: devices, hosts, examples on their way, banks of outputs, evaluation."""
