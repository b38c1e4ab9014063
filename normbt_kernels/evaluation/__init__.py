"""What a reward model is judged by: its rewards, and how each benchmark counts them.

rewards.py        the rewards of pairs and of sequences
rewardbench.py    RewardBench, and any pairs of one's own
questions.py      a question with several answers, which the others are made of
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
