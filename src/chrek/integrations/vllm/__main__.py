"""``python -m chrek.integrations.vllm serve ...``."""

import sys

from chrek.integrations.vllm.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
