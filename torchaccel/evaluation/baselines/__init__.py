"""Other ways of running the same model, a file each; ``--baselines`` names them."""
