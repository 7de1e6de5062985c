"""Independent clients against a running server: QWEN3_URL names it, QWEN3_MODEL its model."""

import base64
import concurrent.futures
import os
import struct

import anthropic
import openai
import pytest
from langchain_openai import ChatOpenAI

URL = os.environ["QWEN3_URL"]
MODEL = os.environ["QWEN3_MODEL"]
QUESTION = "What is 17 + 15?"
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="unused", max_retries=0, timeout=60)
claude = anthropic.Anthropic(base_url=URL, api_key="unused", max_retries=0, timeout=60)


def ask(question=QUESTION, **options):
    options = {"temperature": 0, "max_tokens": 32, "extra_body": NO_THINKING, **options}
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def test_models():
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_chat_streams_what_it_answers_whole():
    whole = ask(logprobs=True, top_logprobs=3)
    choice = whole.choices[0]
    assert "32" in choice.message.content
    assert choice.finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    joined = b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode()
    assert joined == choice.message.content
    assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)
    pieces, usage, finish = "", None, None
    for chunk in ask(stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for piece in chunk.choices:
            pieces += piece.delta.content or ""
            finish = piece.finish_reason or finish
    assert pieces == choice.message.content
    assert finish == "stop"
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_n_and_seed():
    options = {"n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 8}
    first, second = ask("Tell me about music.", **options), ask("Tell me about music.", **options)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(texts) == 3


def test_stop_is_not_returned():
    answer = client.completions.create(
        model=MODEL, prompt="It is a truth universally acknowledged, that",
        max_tokens=48, temperature=0, stop=[" of"])
    assert " of" not in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


def test_completions_of_several_prompts():
    prompts = ["The sea", "It was a"]
    alone = [client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=12)
             for prompt in prompts]
    both = client.completions.create(
        model=MODEL, prompt=prompts, temperature=0, max_tokens=12, echo=True, logprobs=2)
    for prompt, one, choice in zip(prompts, alone, both.choices):
        assert choice.text == prompt + one.choices[0].text
        assert choice.logprobs.token_logprobs[0] is None
        assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs)


def test_the_prompt_alone_has_log_probabilities():
    prompt = "It is a truth universally acknowledged, that"
    options = {"model": MODEL, "prompt": prompt, "temperature": 0, "logprobs": 2}
    alone = client.completions.create(**options, max_tokens=0, echo=True).choices[0]
    assert (alone.text, alone.finish_reason) == (prompt, "length")
    assert alone.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in alone.logprobs.token_logprobs[1:])
    more = client.completions.create(**options, max_tokens=2, echo=True).choices[0].logprobs
    count = len(alone.logprobs.tokens)
    assert more.tokens[:count] == alone.logprobs.tokens
    assert more.token_logprobs[1:count] == pytest.approx(
        alone.logprobs.token_logprobs[1:], rel=1e-4)
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**options, max_tokens=0)
    assert error.value.param == "max_tokens"


def test_sixteen_at_once_answer_as_alone():
    questions = [f"What is {a} + {b}?" for a in range(3, 7) for b in range(5, 9)]
    alone = [ask(question).choices[0].message.content for question in questions]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda q: ask(q).choices[0].message.content, questions))
    assert together == alone


def test_errors_name_the_parameter():
    for options, param in [
        ({"temperature": 9}, "temperature"),
        ({"n": 0}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"extra_body": {"guided_regex": "a"}}, "guided_regex"),
        ({"extra_body": {"chat_template_kwargs": {"messages": []}}},
         "chat_template_kwargs.messages"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"extra_body": {"min_tokens": 33}}, "min_tokens"),
    ]:
        with pytest.raises(openai.BadRequestError) as error:
            ask(**options)
        assert error.value.param == param


def test_images_and_long_prompts_are_refused():
    with pytest.raises(openai.BadRequestError):
        ask([{"type": "image_url", "image_url": {"url": "http://localhost/x.png"}}])
    with pytest.raises(openai.BadRequestError) as error:
        ask("sea " * 9000)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")


def test_tools_may_be_offered():
    tool = {"type": "function", "function": {
        "name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}
    answer = ask(tools=[tool], max_tokens=8)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")
    with pytest.raises(openai.BadRequestError):
        ask(tools=[tool], tool_choice={"type": "function", "function": {"name": "other"}})


def test_responses():
    options = {"model": MODEL, "temperature": 0, "max_output_tokens": 48,
               "reasoning": {"effort": "none"}}
    whole = client.responses.create(input=QUESTION, **options)
    assert "32" in whole.output_text
    with client.responses.stream(input=QUESTION, **options) as stream:
        pieces = "".join(event.delta for event in stream
                         if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert pieces == whole.output_text == final.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens
    with pytest.raises(openai.BadRequestError):
        client.responses.create(input="a", previous_response_id="resp_1", model=MODEL)


def test_messages():
    # The package has no argument for the temperature any more.
    options = {"model": MODEL, "max_tokens": 48, "extra_body": {"temperature": 0},
               "messages": [{"role": "user", "content": QUESTION}]}
    whole = claude.messages.create(**options)
    assert "32" in whole.content[0].text
    assert whole.stop_reason == "end_turn"
    with claude.messages.stream(**options) as stream:
        pieces = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert pieces == whole.content[0].text == final.content[0].text
    counted = claude.messages.count_tokens(model=MODEL, messages=options["messages"])
    usage = whole.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(**{**options, "extra_body": {"temperature": 1.5}})


def test_langchain():
    model = ChatOpenAI(base_url=f"{URL}/v1", api_key="unused", model=MODEL, temperature=0,
                       max_retries=0, extra_body=NO_THINKING)
    whole = model.invoke(QUESTION).content
    assert "32" in whole
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == whole


def test_a_stream_can_be_left():
    for _ in range(8):
        stream = ask("Tell me about music.", stream=True, max_tokens=512, temperature=1.0)
        next(iter(stream))
        stream.close()
    assert "32" in ask().choices[0].message.content


def test_embeddings():
    texts = ["The sea is calm.", "A storm is coming."]
    options = {"model": MODEL, "input": texts}
    numbers = client.embeddings.create(**options, encoding_format="float")
    encoded = client.embeddings.create(**options, encoding_format="base64")
    # Without a format the package asks for base64 and decodes it itself.
    decoded = client.embeddings.create(**options)
    assert [entry.index for entry in numbers.data] == [0, 1]
    for plain, text, own in zip(numbers.data, encoded.data, decoded.data):
        raw = base64.b64decode(text.embedding)
        unpacked = list(struct.unpack(f"<{len(raw) // 4}f", raw))
        assert unpacked == own.embedding
        assert plain.embedding == pytest.approx(unpacked, rel=1e-6)
        assert sum(x * x for x in unpacked) == pytest.approx(1, rel=1e-4)
    assert numbers.data[0].embedding != numbers.data[1].embedding
    assert numbers.usage.prompt_tokens == numbers.usage.total_tokens > 0
    short = client.embeddings.create(**options, encoding_format="float", dimensions=32)
    assert [len(entry.embedding) for entry in short.data] == [32, 32]
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(model=MODEL, input="sea " * 9000)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "input")
