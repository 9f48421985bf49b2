#![doc = include_str!("math.md")]

mod decimal;
mod find;
mod plain;
mod quantity;
mod ratio;
mod same;
mod typography;
mod unit;
mod words;

/// The answer in a completion, verbatim.
#[must_use]
pub fn extract(completion: &str) -> Option<&str> {
    find::in_completion(completion)
}

/// The content of a text's last `\boxed{}`, or the whole list that it ends.
#[must_use]
pub fn boxed(text: &str) -> Option<&str> {
    find::boxed(text)
}

/// Whether the extracted answer equals the reference answer.
#[must_use]
pub fn is_correct(extracted: Option<&str>, reference: &str) -> bool {
    let reference = find::in_reference(reference);
    extracted.is_some_and(|extracted| same::same(&plain::plain(extracted), &plain::plain(reference)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text of a cell of the tables: a code span, with `{n}` for a line end and `{U+202F}` for the character of that number.
    fn text(cell: &str) -> String {
        let code = cell.trim().trim_matches('`');
        let code = code.strip_prefix(' ').and_then(|code| code.strip_suffix(' ')).unwrap_or(code);
        let (first, rest) = code.split_once("{U+").unwrap_or((code, ""));
        let mut text = first.to_owned();
        for part in rest.split("{U+").filter(|part| !part.is_empty()) {
            let (number, after) = part.split_once('}').unwrap();
            text.push(char::from_u32(u32::from_str_radix(number, 16).unwrap()).unwrap());
            text.push_str(after);
        }
        text.replace("{n}", "\n")
    }

    #[test]
    fn every_row_of_the_tables_holds() {
        let mut wrong = Vec::new();
        let rows = include_str!("math.md").lines().filter(|line| line.starts_with('|'));
        let rows: Vec<&str> = rows.filter(|line| !line.starts_with("| rule |") && !line.starts_with("|---")).collect();
        for line in &rows {
            let cells: Vec<&str> = line.trim_matches('|').split(" | ").collect();
            let [_, completion, reference, right] = cells[..] else { panic!("{line}") };
            let (completion, reference) = (text(completion), text(reference));
            let extracted = extract(&completion);
            let is_right = match right.trim() {
                "yes" => true,
                "no" => false,
                _ => panic!("{line}"),
            };
            if is_correct(extracted, &reference) != is_right {
                wrong.push(format!("{line} extracted {extracted:?}"));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(rows.len() > 150);
    }
}
