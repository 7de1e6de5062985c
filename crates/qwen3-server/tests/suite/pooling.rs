//! Embeddings, reranking and scores.

use qwen3_text::{ControlTokens, RerankPrompt, Tokenizer, embedding_tokens};
use serde_json::{Value, json};

use super::{config, small, source, start};

fn numbers(entry: &Value) -> Vec<f64> {
    serde_json::from_value(entry["embedding"].clone()).expect("numbers")
}

#[test]
fn texts_and_their_ids_have_one_embedding_in_each_encoding() {
    let tokenizer = Tokenizer::open(source().folder()).expect("a tokenizer");
    for ranks in [1, 2] {
        let running = start(ranks, config(), &small());
        let texts = ["Elizabeth was", "", "Darcy"];
        let answer =
            running.ok("/v1/embeddings", &json!({"input": texts, "user": "u", "model": "austen"}));
        assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("austen")));
        let data = answer["data"].as_array().expect("a list");
        let ids: Vec<_> = texts
            .iter()
            .map(|text| embedding_tokens(&tokenizer, text, ControlTokens::Literal).expect("ids"))
            .collect();
        let tokens = ids.iter().map(Vec::len).sum::<usize>();
        let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
        assert_eq!(answer["usage"], usage);
        for (index, entry) in data.iter().enumerate() {
            assert_eq!((&entry["object"], &entry["index"]), (&json!("embedding"), &json!(index)));
            let length = numbers(entry).iter().map(|x| x * x).sum::<f64>();
            assert!((length - 1.0).abs() < 1e-5, "{length}");
        }
        assert_ne!(data[0]["embedding"], data[2]["embedding"]);
        assert_eq!(running.ok("/v1/embeddings", &json!({"input": ids}))["data"], answer["data"]);
        let one = running.ok("/v1/embeddings", &json!({"input": ids[2]}));
        assert_eq!(one["data"][0]["embedding"], data[2]["embedding"]);

        let coded = json!({"input": texts[0], "encoding_format": "base64", "dimensions": 16});
        let coded = running.ok("/v1/embeddings", &coded)["data"][0]["embedding"].clone();
        let cut = json!({"input": texts[0], "encoding_format": "float", "dimensions": 16});
        let cut = numbers(&running.ok("/v1/embeddings", &cut)["data"][0]);
        assert_eq!(cut.len(), 16);
        let bytes: Vec<u8> = cut.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect();
        use base64::Engine as _;
        assert_eq!(coded, base64::prelude::BASE64_STANDARD.encode(bytes));

        let query = json!({"input": texts[0], "instruction": "task"});
        let query = running.ok("/v1/embeddings", &query);
        let written = json!({"input": format!("Instruct: task\nQuery:{}", texts[0])});
        assert_eq!(query["data"], running.ok("/v1/embeddings", &written)["data"]);
        // More texts than may wait in the queue.
        let many: Vec<_> = (0..300).map(|index| format!("text {index}")).collect();
        let many = running.ok("/v1/embeddings", &json!({"input": many}));
        assert_eq!(many["data"].as_array().map(Vec::len), Some(300));
        let twice = running.ok("/v1/embeddings", &json!({"input": "text 299"}));
        assert_eq!(many["data"][299]["embedding"], twice["data"][0]["embedding"]);
    }
}

#[test]
fn documents_are_ranked_and_pairs_scored_alike() {
    let running = start(2, config(), &small());
    let documents = ["The ball.", "A letter from Jane", "Pride"];
    let texts = json!([documents[0], {"text": documents[1]}, documents[2]]);
    let answer = running.ok("/v1/rerank", &json!({"query": "Who writes?", "documents": texts}));
    let results = answer["results"].as_array().expect("a list");
    let score = |entry: &Value| entry["relevance_score"].as_f64().expect("a number");
    assert!(results.windows(2).all(|pair| score(&pair[0]) >= score(&pair[1])), "{answer}");
    let pairs = running.ok("/v1/score", &json!({"text_1": "Who writes?", "text_2": documents}));
    assert_eq!(pairs["usage"], answer["usage"]);
    for entry in results {
        let index = entry["index"].as_u64().expect("an index") as usize;
        assert_eq!(entry["document"]["text"], documents[index]);
        assert_eq!(pairs["data"][index]["score"], entry["relevance_score"]);
        assert_eq!(pairs["data"][index]["index"], index);
        assert!((0.0..=1.0).contains(&score(entry)));
    }
    // The bundled model answers with the tokens that stand for "no" and "yes" in these tests.
    let tokenizer = Tokenizer::open(source().folder()).expect("a tokenizer");
    let prompts = RerankPrompt::new(&tokenizer, None).expect("prompts");
    let prompt = prompts.tokens(&tokenizer, "Who writes?", "Pride", ControlTokens::Literal);
    let prompt = prompt.expect("a prompt");
    let completion = json!({"prompt": prompt, "max_tokens": 1, "temperature": 0,
        "logit_bias": {"64": 100, "65": 100}, "logprobs": 20});
    let completion = running.ok("/v1/completions", &completion);
    assert_eq!(completion["usage"]["prompt_tokens"], prompt.len());
    let chosen = completion["choices"][0]["text"].as_str().expect("a text");
    let likely = pairs["data"][2]["score"].as_f64().expect("a number") > 0.5;
    assert_eq!(chosen, tokenizer.decode(&[if likely { 65 } else { 64 }]));

    let best = json!({"query": "Who writes?", "documents": texts, "top_n": 1,
        "return_documents": false});
    let best = running.ok("/v1/rerank", &best);
    assert_eq!(best["results"].as_array().map(Vec::len), Some(1));
    assert_eq!(best["results"][0]["relevance_score"], results[0]["relevance_score"]);
    assert!(best["results"][0].get("document").is_none());
    let both = json!({"text_1": ["a", "b"], "text_2": ["c", "d"]});
    assert_eq!(running.ok("/v1/score", &both)["data"].as_array().map(Vec::len), Some(2));
}

#[test]
fn mistakes_name_their_field() {
    let running = start(1, config(), &small());
    for (path, body, param) in [
        ("/v1/embeddings", json!({}), "input"),
        ("/v1/embeddings", json!({"input": 7}), "input"),
        ("/v1/embeddings", json!({"input": []}), "input"),
        ("/v1/embeddings", json!({"input": [[1], []]}), "input"),
        ("/v1/embeddings", json!({"input": "a", "dimensions": 0}), "dimensions"),
        ("/v1/embeddings", json!({"input": "a", "dimensions": 257}), "dimensions"),
        ("/v1/embeddings", json!({"input": "a", "encoding_format": "hex"}), "encoding_format"),
        ("/v1/embeddings", json!({"input": "a", "temperature": 1}), "temperature"),
        ("/v1/rerank", json!({"query": "a"}), "documents"),
        ("/v1/rerank", json!({"query": "a", "documents": []}), "documents"),
        ("/v1/rerank", json!({"query": "a", "documents": [3]}), "documents[0]"),
        ("/v1/rerank", json!({"query": "a", "documents": ["b"], "top_n": 0}), "top_n"),
        ("/v1/score", json!({"text_1": ["a", "b"], "text_2": "c"}), "text_1"),
        ("/v1/score", json!({"text_1": "a", "text_2": []}), "text_2"),
    ] {
        let answer = running.post(path, &body);
        assert_eq!(answer.status, 400, "{body}: {}", answer.body);
        assert_eq!(answer.json()["error"]["param"], param, "{body}: {}", answer.body);
    }
    let unknown = running.post("/v1/embeddings", &json!({"input": [1, 70000]}));
    assert_eq!(unknown.status, 400);
    assert!(unknown.body.contains("id 70000"), "{}", unknown.body);
    let long = running.post("/v1/embeddings", &json!({"input": vec![1; 10_000]}));
    assert_eq!(
        (long.status, &long.json()["error"]["code"]),
        (400, &json!("context_length_exceeded"))
    );
    let other = running.post("/v1/score", &json!({"text_1": "a", "text_2": "b", "model": "x"}));
    assert_eq!(other.status, 404);
}
