"""Talk to a trained model: `lm chat` in the terminal, `lm serve` over HTTP.

`server` is the program, `api` the HTTP interface, `openai_requests` and `openai_responses` its forms, `served_model` a
model by name, `worker` the thread that runs its engine, `json_constraint` answers that fit a JSON schema, `page.html`
the chat page, `rankings` its verdicts. Another interface gets a file of forms and its routes in `api`.
"""
