"""People rank answers in the browser: the page, what it asks the server, and what the verdicts say."""
