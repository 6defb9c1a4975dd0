"""python ask_openai.py PICTURE QUESTION [SERVER]: through OpenAI's client, as the answer is made."""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

picture, question = sys.argv[1:3]
server = sys.argv[3] if len(sys.argv) > 3 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{server}/v1", api_key=os.environ.get("VLM_API_KEY", "none"))
url = "data:image/png;base64," + base64.b64encode(Path(picture).read_bytes()).decode()
content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
(model, *_) = client.models.list()
for chunk in client.chat.completions.create(
    model=model.id, messages=[{"role": "user", "content": content}], max_tokens=64, stream=True
):
    print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="", flush=True)
print()
