//! The answer in a text, and its normal form.

/// What stands in the last `\boxed{}` whose braces are balanced.
pub fn boxed(text: &str) -> Option<&str> {
    let mut end = text.len();
    while let Some(at) = text[..end].rfind("\\boxed") {
        let rest = text[at + "\\boxed".len()..].trim_start();
        if let Some(inner) = rest.strip_prefix('{').and_then(balanced) {
            return Some(inner.trim());
        }
        end = at;
    }
    None
}

/// The part of `text` before the brace that closes one opened before it. A backslash takes the next character along.
fn balanced(text: &str) -> Option<&str> {
    let mut depth = 0usize;
    let mut escaped = false;
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '{' => depth += 1,
            '}' if depth == 0 => return Some(&text[..i]),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// A number in normal form: no leading zeros, no zeros behind the fraction, no separators, no sign of zero. Currency,
/// percent and degree signs and units in `\text{}` are left out.
pub fn number(text: &str) -> Option<String> {
    let text = without_separators(&normal(text).replace('\u{2212}', "-"))?;
    let (negative, digits) = match text.strip_prefix(['-', '+']) {
        Some(rest) => (text.starts_with('-'), rest),
        None => (false, text.as_str()),
    };
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    let all_digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if !all_digits(whole) || !all_digits(part) || (whole.is_empty() && part.is_empty()) {
        return None;
    }
    let (whole, part) = (whole.trim_start_matches('0'), part.trim_end_matches('0'));
    let sign = if negative && !(whole.is_empty() && part.is_empty()) { "-" } else { "" };
    let whole = if whole.is_empty() { "0" } else { whole };
    Some(if part.is_empty() { format!("{sign}{whole}") } else { format!("{sign}{whole}.{part}") })
}

/// Takes commas out that stand before groups of three digits; `None` if a comma stands elsewhere.
fn without_separators(text: &str) -> Option<String> {
    let (whole, part) = text.split_once('.').map_or((text, None), |(w, p)| (w, Some(p)));
    let mut groups = whole.split(',');
    let first = groups.next().unwrap_or("");
    let three = |g: &str| g.len() == 3 && g.bytes().all(|b| b.is_ascii_digit());
    if whole.contains(',') && (first.trim_start_matches(['-', '+']).is_empty() || !groups.all(three)) {
        return None;
    }
    let whole = whole.replace(',', "");
    Some(part.map_or(whole.clone(), |p| format!("{whole}.{p}")))
}

/// Spellings that say nothing: sizes, spaces, signs of mathematics mode, units of angle and money.
const DROPPED: [&str; 17] = [
    "\\left",
    "\\right",
    "\\displaystyle",
    "\\!",
    "\\,",
    "\\;",
    "\\:",
    "\\ ",
    "\\$",
    "$",
    "\\%",
    "%",
    "^{\\circ}",
    "^\\circ",
    "\\(",
    "\\)",
    "~",
];

/// LaTeX without spellings that say nothing.
pub fn normal(text: &str) -> String {
    let mut s = text.trim().trim_end_matches('.').trim().to_owned();
    for (from, to) in [("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("{,}", ",")] {
        s = s.replace(from, to);
    }
    for word in DROPPED {
        // `\leftarrow` is no `\left`.
        s = if word.ends_with(|c: char| c.is_ascii_alphabetic()) {
            drop_command(&s, word)
        } else {
            s.replace(word, "")
        };
    }
    without_spaces(&words(&s)).trim_end_matches('.').to_owned()
}

/// Takes spaces out, but for one between two letters or digits: `3 5` is not `35`.
fn without_spaces(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut space = false;
    for c in text.chars() {
        if c.is_whitespace() {
            space = true;
            continue;
        }
        if space && c.is_alphanumeric() && out.ends_with(char::is_alphanumeric) {
            out.push(' ');
        }
        space = false;
        out.push(c);
    }
    out
}

fn drop_command(text: &str, word: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(word) {
        let (before, after) = (&rest[..at], &rest[at + word.len()..]);
        out += before;
        if after.starts_with(|c: char| c.is_ascii_alphabetic()) {
            out += word;
        }
        rest = after;
    }
    out + rest
}

/// Takes `\text{}` and its like away: their content stays where it is all there is, and goes where it is a unit behind
/// something else.
fn words(text: &str) -> String {
    for command in ["\\text{", "\\textbf{", "\\mathrm{", "\\mbox{"] {
        let Some(at) = text.rfind(command) else { continue };
        let Some(inner) = balanced(&text[at + command.len()..]) else { continue };
        let after = text[at + command.len() + inner.len() + 1..].trim();
        match (text[..at].trim(), after) {
            ("", "") => return inner.to_owned(),
            (before, "") => return words(before),
            _ => {}
        }
    }
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_last_box_counts() {
        for (text, want) in [
            ("", None),
            ("no box 5", None),
            ("\\boxed{5}", Some("5")),
            ("\\boxed{5} or \\boxed{ 6 }.", Some("6")),
            ("\\boxed{\\frac{1}{2}} end", Some("\\frac{1}{2}")),
            ("\\boxed{\\{1, 2\\}}", Some("\\{1, 2\\}")),
            ("\\boxed{\\boxed{7}}", Some("7")),
            ("\\boxed {8}", Some("8")),
            ("\\boxed{9} and \\boxed{\\frac{1}{", Some("9")),
            ("\\boxed{} ", Some("")),
            ("\\boxed5", None),
            ("\\boxed{1", None),
        ] {
            assert_eq!(boxed(text), want, "{text}");
        }
    }

    #[test]
    fn numbers() {
        for (text, want) in [
            ("033", Some("33")),
            ("0", Some("0")),
            ("-0.0", Some("0")),
            ("1,234,567.50", Some("1234567.5")),
            ("1{,}000", Some("1000")),
            ("-12", Some("-12")),
            ("\u{2212}12", Some("-12")),
            ("+3", Some("3")),
            (".5", Some("0.5")),
            ("5.", Some("5")),
            ("$5$", Some("5")),
            ("\\$5", Some("5")),
            ("50\\%", Some("50")),
            ("5 \\text{ cm}", Some("5")),
            ("\\text{5}", Some("5")),
            ("1,23", None),
            (",123", None),
            ("1.2.3", None),
            ("5 cm", None),
            ("3 5", None),
            ("x", None),
            ("-", None),
            (".", None),
            ("", None),
        ] {
            assert_eq!(number(text).as_deref(), want, "{text}");
        }
    }

    #[test]
    fn normal_forms() {
        for (text, want) in [
            ("\\left( 3, \\tfrac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
            ("\\leftarrow", "\\leftarrow"),
            ("\\text{(C)}", "(C)"),
            ("11 \\text{ miles}", "11"),
            ("\\text{a} + \\text{b}", "\\text{a}+"),
            ("x = 5.", "x=5"),
            ("120^{\\circ}", "120"),
        ] {
            assert_eq!(normal(text), want, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "(\\\\boxed|[{}\\\\.,0-9a\u{e9} ]|\\\\text\\{|####){0,24}") {
            let _ = (boxed(&text), number(&text), normal(&text));
        }
    }
}
