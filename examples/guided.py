"""Answers of a form: a JSON schema, a regular expression, and one of three words.

You see an object with the members of the schema, a date, and a word, whatever the model would have
written otherwise. Each answer ends when its form is complete.
"""

import json

from pdjax import LLM, Guide, SamplingParams

schema = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "capital": {"type": "boolean"},
    },
    "required": ["city", "capital"],
    "additionalProperties": False,
}
guides = [
    Guide.json_schema(schema),
    Guide.regex("(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]"),
    Guide.choices(["yes", "no", "perhaps"]),
]
prompts = ["A city, as JSON: ", "Paris fell on ", "Is Paris the capital of France? "]
params = [SamplingParams(temperature=0.0, max_tokens=96, guide=guide) for guide in guides]
with LLM("smollm2") as llm:
    city, date, word = llm.generate(prompts, params)
    print("members:", ", ".join(json.loads(city.text)))
    print("date:", date.text)
    print("word:", word.text)
