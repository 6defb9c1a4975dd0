#!/bin/sh
# sh ask.sh PICTURE QUESTION [SERVER]: one answer as JSON, with curl. The question goes into JSON as it is.
server="${3:-http://127.0.0.1:8000}"
picture="data:image/png;base64,$(base64 < "$1" | tr -d '\n')"
curl --silent --show-error --fail-with-body "$server/v1/chat/completions" \
  -H "Content-Type: application/json" -H "Authorization: Bearer ${VLM_API_KEY:-none}" --data @- <<END
{
  "max_tokens": 64,
  "messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "$picture"}},
    {"type": "text", "text": "$2"}
  ]}]
}
END
