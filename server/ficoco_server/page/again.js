// SPDX-License-Identifier: Apache-2.0
// A request of this page as it would be sent from a shell, and from Python.

import { base, key } from "./server.js";

/** The body of a chat completion. */
export function chat({ model, question, longest, settings }, url) {
  const content = [{ type: "image_url", image_url: { url } }, { type: "text", text: question }];
  return { model, messages: [{ role: "user", content }], max_tokens: longest, temperature: 0, ...settings };
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const HERE = "THE PICTURE STANDS HERE";

export function asCurl(asked, picture) {
  const read = picture.at ? `curl -s ${quoted(picture.at)} | base64` : `base64 < ${quoted(picture.name)}`;
  const url = `data:${picture.type};base64,$(${read} | tr -d '\\n')`;
  // Between the two words END a shell fills in what it is told to, so all else must be escaped.
  const body = JSON.stringify(chat(asked, HERE), null, 2).replace(/[\\$`]/g, "\\$&").replace(HERE, () => url);
  const header = key() ? ' \\\n  -H "Authorization: Bearer $OPENAI_API_KEY"' : "";
  return `curl -s ${quoted(`${base}v1/chat/completions`)} \\
  -H 'Content-Type: application/json'${header} -d @- <<END
${body}
END
`;
}

export function asPython(asked, picture) {
  const text = JSON.stringify; // of words and numbers it is Python, too
  const read = picture.at ? `urllib.request.urlopen(${text(picture.at)})` : `open(${text(picture.name)}, "rb")`;
  const client = key() ? `base_url=${text(`${base}v1`)})  # the key: OPENAI_API_KEY` : `base_url=${text(`${base}v1`)}, api_key="none")`;
  return `import base64
${picture.at ? "import urllib.request\n" : ""}
from openai import OpenAI

client = OpenAI(${client}
image = base64.b64encode(${read}.read()).decode()
question = [
    {"type": "image_url", "image_url": {"url": ${text(`data:${picture.type};base64,`)} + image}},
    {"type": "text", "text": ${text(asked.question)}},
]
answer = client.chat.completions.create(
    model=${text(asked.model)},
    messages=[{"role": "user", "content": question}],
    max_tokens=${asked.longest},
    temperature=0,
    extra_body=${text(asked.settings)},
)
print(answer.choices[0].message.content)
print(answer.model_extra["reduction"])
`;
}
