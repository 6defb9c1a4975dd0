"""`vlm-serve`: a bundle behind OpenAI's chat API, with a chat page. Needs the extra `serve`."""
