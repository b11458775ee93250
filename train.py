"""Train a personalised reward model or policy.

python train.py                                     # lookup reward model on the embedded world
python train.py model=dpo encoder=cluster           # a policy, users as cluster mixtures
python train.py data=jsonl data.path=rows.jsonl backbone=hf backbone.path=DIR
python train.py -m encoder=none,lookup seed=1,2,3   # a sweep
"""

from plrhf.cli.commands import train

if __name__ == "__main__":
    train()
