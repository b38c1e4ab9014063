"""The pairs of a part of the standard library in one number: python -m tests.stdlib_digest

Prints how this process hashes a text, by which it orders its sets, and that number, which must not go by it.
"""

import hashlib
import os
import sysconfig

from normbt_kernels.data import stdlib_faults

LEFT_OUT = stdlib_faults.LEFT_OUT | {
    name for name in os.listdir(sysconfig.get_paths()["stdlib"]) if not name.startswith(("i", "j"))
}


def digest():
    vocabulary = sorted(stdlib_faults.make_tokenizer().get_vocab().items())
    facts = stdlib_faults.functions(), stdlib_faults.split_pairs("test", 0), vocabulary
    return hashlib.sha256(repr(facts).encode()).hexdigest()


if __name__ == "__main__":
    stdlib_faults.LEFT_OUT = LEFT_OUT
    print(hash("a text"), digest())
