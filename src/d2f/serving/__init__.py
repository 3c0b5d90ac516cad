"""The server: OpenAI's protocol on HTTP, one engine thread, a page to watch it decode."""
