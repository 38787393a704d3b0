"""HTTP in OpenAI's dialect over anything that answers requests: it knows a callable (`queue.Generate`), no engine."""
