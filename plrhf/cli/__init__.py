"""The command line: settings, and the commands that train.py and eval.py run."""
