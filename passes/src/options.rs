//! Options of passes: one list gives the struct, the parser, the printer and the help.

use std::fmt;

/// A value in pipeline text.
#[derive(Clone, PartialEq, Debug)]
pub enum OptionValue {
    /// A bare word or a quoted string.
    Word(String),
    /// A number, as written.
    Number(String),
    /// A list.
    List(Vec<OptionValue>),
}

impl fmt::Display for OptionValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // What would read back as something else is quoted.
            OptionValue::Word(w) if !is_word(w) || w.parse::<f64>().is_ok() => write!(f, "\"{w}\""),
            OptionValue::Word(w) => f.write_str(w),
            OptionValue::Number(n) => f.write_str(n),
            OptionValue::List(v) => {
                f.write_str("[")?;
                for (i, x) in v.iter().enumerate() {
                    write!(f, "{}{x}", if i > 0 { "," } else { "" })?;
                }
                f.write_str("]")
            }
        }
    }
}

/// Whether a text is a word of pipeline text as it stands.
pub(crate) fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(is_word_char)
}

pub(crate) fn is_word_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-_.".contains(c)
}

/// A type that an option can have.
pub(crate) trait OptionType: Sized {
    /// What the help calls it.
    const KIND: &'static str;
    fn read(value: &OptionValue) -> Option<Self>;
    fn write(&self) -> OptionValue;
}

macro_rules! number_option {
    ($ty:ty, $kind:literal) => {
        impl OptionType for $ty {
            const KIND: &'static str = $kind;
            fn read(value: &OptionValue) -> Option<Self> {
                match value {
                    OptionValue::Number(n) => n.parse().ok(),
                    _ => None,
                }
            }
            fn write(&self) -> OptionValue {
                OptionValue::Number(self.to_string())
            }
        }
    };
}
number_option!(u8, "whole number");
number_option!(u32, "whole number");
number_option!(f64, "number");

impl OptionType for bool {
    const KIND: &'static str = "true or false";
    fn read(value: &OptionValue) -> Option<Self> {
        match value {
            OptionValue::Word(w) => w.parse().ok(),
            _ => None,
        }
    }
    fn write(&self) -> OptionValue {
        OptionValue::Word(self.to_string())
    }
}

impl OptionType for Vec<String> {
    const KIND: &'static str = "list of words";
    fn read(value: &OptionValue) -> Option<Self> {
        let word = |v: &OptionValue| match v {
            OptionValue::Word(w) => Some(w.clone()),
            _ => None,
        };
        match value {
            OptionValue::List(v) => v.iter().map(word).collect(),
            v => word(v).map(|w| vec![w]),
        }
    }
    fn write(&self) -> OptionValue {
        OptionValue::List(self.iter().cloned().map(OptionValue::Word).collect())
    }
}

macro_rules! width_option {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $allowed:pat) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub(crate) struct $name(pub(crate) u8);

        impl OptionType for $name {
            const KIND: &'static str = $kind;
            fn read(value: &OptionValue) -> Option<Self> {
                match value {
                    OptionValue::Number(n) => n.parse().ok().filter(|n| matches!(n, $allowed)).map($name),
                    _ => None,
                }
            }
            fn write(&self) -> OptionValue {
                OptionValue::Number(self.0.to_string())
            }
        }
    };
}
width_option!(
    /// A width in bits of codes.
    Bits, "2 to 8", 2..=8
);
width_option!(
    /// A width in bits, 16 for "not quantized".
    Width, "2 to 8, or 16 for not quantized", 2..=8 | 16
);
width_option!(
    /// A width in bits of cached codes: the widths in which caches are stored.
    CacheBits, "2, 3, 4 or 8", 2..=4 | 8
);
width_option!(
    /// A width in bits of cached codes, 16 for "not quantized".
    CacheWidth, "2, 3, 4 or 8, or 16 for not quantized", 2..=4 | 8 | 16
);

impl Width {
    /// The width, if it is one of codes.
    pub(crate) fn quantized(self) -> Option<u8> {
        (self.0 < 16).then_some(self.0)
    }
}

impl CacheWidth {
    /// The width, if it is one of codes.
    pub(crate) fn quantized(self) -> Option<u8> {
        (self.0 < 16).then_some(self.0)
    }
}

/// Weights along the input that share a scale: a size, or `row` for all of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Group {
    Row,
    Size(u32),
}

impl Group {
    pub(crate) fn grain(self) -> qrmc_ir::Grain {
        match self {
            Group::Row => qrmc_ir::Grain::Row,
            Group::Size(n) => qrmc_ir::Grain::Group(n),
        }
    }
}

impl OptionType for Group {
    const KIND: &'static str = "a size or `row`";
    fn read(value: &OptionValue) -> Option<Self> {
        match value {
            OptionValue::Word(w) if w == "row" => Some(Group::Row),
            OptionValue::Number(n) if n == "-1" => Some(Group::Row),
            OptionValue::Number(n) => n.parse().ok().filter(|n| *n > 0).map(Group::Size),
            _ => None,
        }
    }
    fn write(&self) -> OptionValue {
        match self {
            Group::Row => OptionValue::Word("row".into()),
            Group::Size(n) => OptionValue::Number(n.to_string()),
        }
    }
}

macro_rules! word_option {
    ($ty:ty, $kind:literal, $($word:literal => $value:expr),+) => {
        impl OptionType for $ty {
            const KIND: &'static str = $kind;
            fn read(value: &OptionValue) -> Option<Self> {
                match value {
                    OptionValue::Word(w) => match w.as_str() {
                        $($word => Some($value),)+
                        _ => None,
                    },
                    _ => None,
                }
            }
            fn write(&self) -> OptionValue {
                OptionValue::Word(self.to_string())
            }
        }
    };
}
pub(crate) use word_option;
word_option!(qrmc_ir::ScaleType, "f32, f16 or bf16",
    "f32" => qrmc_ir::ScaleType::F32, "f16" => qrmc_ir::ScaleType::F16, "bf16" => qrmc_ir::ScaleType::BF16);
word_option!(qrmc_ir::Rule, "minmax, awq or mse",
    "minmax" => qrmc_ir::Rule::MinMax, "awq" => qrmc_ir::Rule::Awq, "mse" => qrmc_ir::Rule::Mse);

/// One option, for help and documentation.
#[derive(Clone, PartialEq, Debug)]
pub struct OptionInfo {
    /// Name.
    pub name: &'static str,
    /// What values it takes.
    pub kind: &'static str,
    /// Default, as text.
    pub default: String,
    /// One line of explanation.
    pub help: &'static str,
}

/// An option that a pass does not take.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub(crate) enum OptionError {
    #[error("no option `{0}`")]
    Unknown(String),
    #[error("option `{name}` is {kind}, not `{value}`")]
    Value { name: &'static str, kind: &'static str, value: String },
}

/// Makes an options struct: fields with defaults and help, `read`, `write` and `info`.
macro_rules! options {
    ($(#[$meta:meta])* struct $name:ident { $($(#[doc = $help:literal])+ $field:ident: $ty:ty = $default:expr,)* }) => {
        $(#[$meta])*
        #[derive(Clone, PartialEq, Debug)]
        pub(crate) struct $name { $($(#[doc = $help])+ pub(crate) $field: $ty,)* }

        impl Default for $name {
            fn default() -> Self {
                $name { $($field: $default,)* }
            }
        }

        impl $name {
            pub(crate) fn read(
                given: &[(String, $crate::options::OptionValue)],
            ) -> Result<Self, $crate::options::OptionError> {
                #[allow(unused_mut, reason = "a pass may have no options")]
                let mut o = Self::default();
                #[allow(unused_variables, reason = "a pass may have no options")]
                for (key, value) in given {
                    match key.replace('-', "_").as_str() {
                        $(stringify!($field) => {
                            o.$field = <$ty as $crate::options::OptionType>::read(value).ok_or_else(|| {
                                $crate::options::OptionError::Value {
                                    name: stringify!($field),
                                    kind: <$ty as $crate::options::OptionType>::KIND,
                                    value: value.to_string(),
                                }
                            })?;
                        })*
                        _ => return Err($crate::options::OptionError::Unknown(key.clone())),
                    }
                }
                Ok(o)
            }

            /// Every option with its value: the normal form.
            #[allow(dead_code, reason = "a preset is replaced by the passes that it stands for")]
            pub(crate) fn write(&self) -> Vec<(String, $crate::options::OptionValue)> {
                vec![$((stringify!($field).to_owned(), $crate::options::OptionType::write(&self.$field)),)*]
            }

            pub(crate) fn info() -> Vec<$crate::options::OptionInfo> {
                #[allow(unused_variables, reason = "a pass may have no options")]
                let d = Self::default();
                vec![$($crate::options::OptionInfo {
                    name: stringify!($field),
                    kind: <$ty as $crate::options::OptionType>::KIND,
                    default: $crate::options::OptionType::write(&d.$field).to_string(),
                    help: concat!($($help),+).trim_ascii(),
                },)*]
            }
        }
    };
}
pub(crate) use options;
