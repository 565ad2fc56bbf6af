#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   aiperf 0.13.0 (NVIDIA's load generator)
# Date:      2026-11-28, Python 3.11
# Source:    aiperf/common/tokenizer.py: with HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) every name of a tokenizer is looked up in the
#            hub's cache, as a repository's, a folder's too
# Behaviour: `--tokenizer FOLDER` works where the hub may be asked, and is refused where it may not: the variable that keeps
#            programs off the network is the one thing that a tokenizer on the disk does not work with.
# Expected:  a folder is read in both cases, as transformers does.
# Means:     README's command for aiperf says to unset it.
# Seen:
#   the hub may be asked: 3 tokens
#   HF_HUB_OFFLINE=1: TokenizerError
#   HF_HUB_OFFLINE=1, transformers alone: 3 tokens
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet aiperf==0.13.0 || exit 2
cat > "$folder/show.py" <<'PY'
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

how, folder = sys.argv[1:]
core = Tokenizer(models.WordLevel({"<unk>": 0, "what": 1, "is": 2, "this": 3}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
if how == "transformers":
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print(len(tokenizer("what is this")["input_ids"]), "tokens")
else:
    from aiperf.common.tokenizer import Tokenizer as Theirs

    try:
        tokenizer = Theirs.from_pretrained(folder)
        print(len(tokenizer.encode("what is this")), "tokens")
    except Exception as error:
        print(type(error).__name__)
PY
python="$folder/venv/bin/python"
export HF_HOME="$folder/hub"
unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE
online=$("$python" "$folder/show.py" aiperf "$folder/tokenizer" 2> "$folder/log" | tail -n 1) || exit 2
export HF_HUB_OFFLINE=1
offline=$("$python" "$folder/show.py" aiperf "$folder/tokenizer" 2> "$folder/log" | tail -n 1) || exit 2
alone=$("$python" "$folder/show.py" transformers "$folder/tokenizer" 2> "$folder/log" | tail -n 1) || exit 2
echo "the hub may be asked: $online"
echo "HF_HUB_OFFLINE=1: $offline"
echo "HF_HUB_OFFLINE=1, transformers alone: $alone"
[[ $online == "3 tokens" && $offline == TokenizerError && $alone == "3 tokens" ]]
