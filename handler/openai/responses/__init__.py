"""OpenAI's Responses API, stateless: text in, text and function calls out, whole or as events."""
