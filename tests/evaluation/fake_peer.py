"""Stands in for a peer's process: obeys, or misbehaves as its argument says once the model is loaded."""

from __future__ import annotations

import json
import sys
import time


def main(manner: str) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "load":
            answer = {"seen": sorted(request)}
        elif manner == "hang":
            time.sleep(60)
        elif manner == "die":
            print("out of memory in the peer", file=sys.stderr)
            sys.exit(3)
        elif manner == "garbage":
            print("Downloading 3 files...", flush=True)
            continue
        elif manner == "list":
            answer = [1, 2]
        elif manner == "refuse":
            answer = {"error": "ValueError: this press needs a question"}
        else:
            tokens = [[7] * request["new_tokens"] for _ in request["prompt"]]
            answer = {"tokens": tokens, "ms": 9.0, "ttft_ms": 5.0, "tpot_ms": 1.0, "kv_bytes": 1234, "bytes": 5678}
            if request["do"] == "sample":
                answer.pop("bytes")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
