def own(base_url, api_key, model, messages):
    import openai

    client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    said = (
        client.chat.completions.create(model=model, messages=messages).choices[0].message.content
        or ""
    )
    return float(len(said) % 3)


async def given(client, model, messages):
    said = (await client.chat.completions.create(model=model, messages=messages)).choices[
        0
    ].message.content or ""
    return float(len(said) % 3)
