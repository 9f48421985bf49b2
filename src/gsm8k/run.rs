//! Writes rows as records in the order asked for: the work of `gsm8k-prep`.

use super::Row;
use super::order::RowOrder;
use super::pass_rates::{LeftOut, PassRates};
use super::prompt::PromptStyle;
use super::source::RowStream;
use crate::error::Result;
use crate::lines::jsonl::Output;

/// What was not written.
#[derive(Debug, Default)]
pub struct Skipped {
    /// Rows without an answer, or without the reasoning that a demonstration needs.
    pub unanswered: usize,
    /// Problems that pass rates speak against.
    pub left_out: Option<LeftOut>,
}

/// Writes the records of `rows`; with pass rates, of those that a group can learn from.
///
/// Rows stream through if the order keeps that of the file; a shuffle reads them all first.
///
/// # Errors
/// The errors of the rows, the order and the output.
pub fn prepare(
    rows: RowStream,
    order: &RowOrder<'_>,
    rates: Option<&PassRates>,
    style: &PromptStyle,
    out: &mut Output,
) -> Result<Skipped> {
    order.check()?;
    let mut skipped = Skipped::default();
    let split = order.split.published();
    let mut answered = rows.filter(|row| {
        let skip = row.as_ref().is_ok_and(|row| !style.suits(row));
        skipped.unanswered += usize::from(skip);
        !skip
    });
    let mut write = |row: &Row, epoch| match style.record(row, split, epoch) {
        Some(record) => out.write_line(&record),
        None => Ok(()),
    };
    let mut left_out = None;
    if order.is_natural() && rates.is_none() {
        answered.by_ref().take(order.limit.unwrap_or(usize::MAX)).try_for_each(|row| write(&row?, 0))?;
    } else {
        let rows = answered.by_ref().collect::<Result<Vec<Row>>>()?;
        let measured = rates.map(|rates| rates.variances(rows.iter().map(|row| style.prompt_id(row, split))));
        let usefulness;
        (usefulness, left_out) = measured.unzip();
        let order = RowOrder { usefulness: usefulness.as_deref(), ..*order };
        order.all(rows.len())?.into_iter().try_for_each(|(place, epoch)| write(&rows[place], epoch))?;
    }
    drop(answered);
    Ok(Skipped { left_out, ..skipped })
}
