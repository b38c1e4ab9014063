"""How a reward model is judged: its rewards, and how each benchmark counts them. A new benchmark is a new file here and
a name in commands/benchmark.py.

rewards.py        the rewards of pairs and of sequences
rewardbench.py    RewardBench, and any other pairs
questions.py      a question with several answers: the others consist of them
rewardbench2.py   RewardBench 2: the best of four, and Ties
rm_bench.py       RM-Bench: three styles of each answer
judgebench.py     JudgeBench: pairs by source
"""

from normbt_kernels.evaluation.rewardbench import SECTION_OF, SECTIONS, Accuracy, accuracy, section_means
from normbt_kernels.evaluation.rewards import score_pairs, score_sequences

__all__ = [
    "SECTIONS",
    "SECTION_OF",
    "Accuracy",
    "accuracy",
    "score_pairs",
    "score_sequences",
    "section_means",
]
