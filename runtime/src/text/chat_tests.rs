use super::*;
use serde_json::{Value as Json, json};

/// Chats rendered by `transformers`; a template without a source is a file.
const CHATS: &str = include_str!("testdata/chats.json");
const QWEN3: &str = include_str!("testdata/qwen3.jinja");
const TINY: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/tiny-qwen2-wiki/tokenizer_config.json");

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, &[("bos_token", "<s>")]).unwrap()
}

fn user(content: &str) -> Vec<Message> {
    vec![Message::new("user", content)]
}

#[test]
fn as_transformers_renders() {
    let golden: Json = serde_json::from_str(CHATS).unwrap();
    let tiny: Json = serde_json::from_slice(&std::fs::read(TINY).unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let entry = &golden["templates"][name];
        let source = match name {
            "qwen3" => QWEN3,
            "r1" => tiny["chat_template"].as_str().unwrap(),
            _ => entry["source"].as_str().unwrap(),
        };
        let specials: Vec<(&str, &str)> = entry["specials"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(k, v)| (k.as_str(), v.as_str().unwrap()))
            .collect();
        let chat = ChatTemplate::new(source, &specials).unwrap();
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let generate = case["generate"].as_bool().unwrap();
        let got = chat.render_with(&messages, generate, case["vars"].as_object().unwrap()).unwrap();
        assert_eq!(got, case["text"].as_str().unwrap(), "{name}: {messages:?}");
    }
    assert!(cases.len() >= 40);
}

#[test]
fn templates_are_found() {
    let find = |config: Json, jinja: Option<&str>| {
        let chat = ChatTemplate::from_config(config.as_object().unwrap(), jinja)?;
        chat.map(|c| c.render(&user("x"), true)).transpose()
    };
    let named = json!({"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]});
    assert_eq!(find(named.clone(), None).unwrap().unwrap(), "D");
    assert_eq!(find(named, Some("J")).unwrap().unwrap(), "J");
    assert_eq!(find(json!({"chat_template": null}), None), Ok(None));
    let object = json!({"chat_template": "{{ bos_token }}|{{ pad_token }}|{{ messages[0].content }}",
                        "bos_token": {"content": "<b>", "lstrip": false}, "pad_token": null});
    assert_eq!(find(object, None).unwrap().unwrap(), "<b>||x");
    let err = find(json!({"chat_template": [{"name": "rag", "template": "T"}]}), None).unwrap_err();
    assert!(err.what.contains("rag"), "{err}");
    assert!(find(json!({"chat_template": 3}), None).is_err());
}

#[test]
fn refusals_carry_the_message_of_the_template() {
    let err =
        template("{{ raise_exception('system role not supported') }}").render(&user("x"), true).unwrap_err();
    assert!(err.what.contains("system role not supported"), "{err}");
    let err = template("{{ strftime_now('%Y') }}").render(&user("x"), true).unwrap_err();
    assert!(err.hint.contains("strftime_now"), "{err}");
    let guarded = template("{{ strftime_now('%Y') if strftime_now is defined else '2024' }}");
    assert_eq!(guarded.render(&user("x"), true).unwrap(), "2024");
    assert!(ChatTemplate::new("{% if %}", &[]).unwrap_err().what.contains("does not compile"));
    assert!(template("{{ messages[3].content.x }}").render(&user("x"), true).is_err());
}

#[test]
fn runaway_templates_stop() {
    let loops = "{% for a in range(9999) %}{% for b in range(9999) %}xxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}";
    assert!(template(loops).render(&user("x"), true).is_err());
    let recursion = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}";
    assert!(template(recursion).render(&user("x"), true).is_err());
}

#[test]
fn json_as_python_writes_it() {
    let vars = json!({"v": {"b": [1, -2.5, "é\n\"<"], "a": {}, "c": []}, "tools": null});
    let got = template("{{ v | tojson }}|{{ v | tojson(indent=2) }}")
        .render_with(&user("x"), false, vars.as_object().unwrap())
        .unwrap();
    let line = "{\"b\": [1, -2.5, \"é\\n\\\"<\"], \"a\": {}, \"c\": []}";
    let tall = "{\n  \"b\": [\n    1,\n    -2.5,\n    \"é\\n\\\"<\"\n  ],\n  \"a\": {},\n  \"c\": []\n}";
    assert_eq!(got, format!("{line}|{tall}"));
}

#[test]
fn generation_tags_vanish_and_others_stay() {
    let source = "{%- generation -%} a {% endgeneration %}{% set x = '{% generation' %}{{ x }} {% x";
    let want = "{%- if true -%} a {% endif %}{% set x = '{% generation' %}{{ x }} {% x";
    assert_eq!(without_generation_tags(source), want);
}
