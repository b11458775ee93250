"""Evaluate finished runs.

python eval.py run=DIR                              # the run's own test rows again
python eval.py run=DIR data=jsonl data.path=F       # other rows
python eval.py eval=generate run=DIR                # texts for many users
python eval.py eval=winrate run=DIR eval.against=DIR  # eval/judge=preferences, reward, chat
python eval.py eval=adapt run=DIR                   # new users, from a few pairs of theirs
python eval.py eval=compare runs='runs/*' out=DIR   # one table, one report
python eval.py eval=referee data=jsonl data.path=F backbone.path=DIR  # every method, by one protocol
"""

from plrhf.cli.commands import evaluate

if __name__ == "__main__":
    evaluate()
