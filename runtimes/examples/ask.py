"""python ask.py BUNDLE PICTURE QUESTION: the answer as it is made, then a second question about the same picture."""

import sys

import vlm_runtime

bundle, picture, question = sys.argv[1:]
model = vlm_runtime.load(bundle)

chat = model.chat()
for piece in chat.ask(question, [picture], max_new_tokens=64):
    print(piece, end="", flush=True)
print()

print("".join(chat.ask("Are you sure?", max_new_tokens=64)))
if chat.last is not None:
    print({stage: round(ms) for stage, ms in chat.last.timings_ms.items()}, file=sys.stderr)
