"""How it is run: devices, hosts, compiled steps, examples on their way to them, banks, evaluation, progress."""
