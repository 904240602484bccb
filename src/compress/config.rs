//! Edits numbers of a `config.json` in place. Everything else stays byte for byte: tools disagree about configs that
//! were parsed and written anew.

/// Replaces the number at key `key` of the object that the keys `section` lead to, of the whole text where there are none,
/// by `value`. `None` where the key is absent or holds no number.
pub(super) fn set_number(text: &str, section: &[&str], key: &str, value: usize) -> Option<String> {
    let object = section.iter().try_fold(0, |object, key| value_start(text, object, key))?;
    let start = value_start(text, object, key)?;
    let digits = text.as_bytes()[start..].iter().take_while(|b| matches!(b, b'0'..=b'9' | b'.')).count();
    (digits > 0).then(|| format!("{}{value}{}", &text[..start], &text[start + digits..]))
}

/// Where the value of `key` begins in the object that begins at `object`.
fn value_start(text: &str, object: usize, key: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let quoted = format!("\"{key}\"");
    let (mut depth, mut at) = (0usize, skip_space(bytes, object));
    if bytes.get(at) != Some(&b'{') {
        return None;
    }
    while at < bytes.len() {
        match bytes[at] {
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth <= 1 => return None,
            b'}' | b']' => depth -= 1,
            b'"' => {
                let end = string_end(bytes, at)?;
                if depth == 1 && text[at..end] == quoted {
                    let colon = skip_space(bytes, end);
                    if bytes.get(colon) == Some(&b':') {
                        return Some(skip_space(bytes, colon + 1));
                    }
                }
                at = end;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// Index behind the string that begins at `start`.
fn string_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    loop {
        match bytes.get(at)? {
            b'\\' => at += 2,
            b'"' => return Some(at + 1),
            _ => at += 1,
        }
    }
}

fn skip_space(bytes: &[u8], mut at: usize) -> usize {
    while bytes.get(at).is_some_and(u8::is_ascii_whitespace) {
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::set_number;

    #[test]
    fn only_the_number_at_the_top_level_changes() {
        let text = "{\"a\": {\"n\": 1}, \"s\": \"\\\"n\\\": 5\",\n  \"n\" : 64,\t\"b\": [\"n\", 3], \"eps\": 1e-05}\n";
        let expected = text.replace("64", "48");
        assert_eq!(set_number(text, &[], "n", 48).as_deref(), Some(expected.as_str()));
    }

    #[test]
    fn absent_keys_and_other_types_are_refused() {
        for text in ["{}", "{\"n\": null}", "{\"n\": \"8\"}", "{\"m\": {\"n\": 8}}", "", "{\"n"] {
            assert_eq!(set_number(text, &[], "n", 4), None, "{text}");
        }
    }

    #[test]
    fn numbers_of_a_section() {
        let text = r#"{"n": 1, "vision": {"n": 2}, "text": {"m": {"n": 3}, "n": 4, "k": [5]}, "after": 6}"#;
        let expected = text.replace('4', "48");
        assert_eq!(set_number(text, &["text"], "n", 48).as_deref(), Some(expected.as_str()));
        let expected = text.replace('3', "48");
        assert_eq!(set_number(text, &["text", "m"], "n", 48).as_deref(), Some(expected.as_str()));
        for (section, key) in [("text", "after"), ("text", "k"), ("n", "n"), ("none", "n"), ("vision", "k")] {
            assert_eq!(set_number(text, &[section], key, 4), None, "{section} {key}");
        }
    }
}
