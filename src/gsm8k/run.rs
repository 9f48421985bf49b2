//! Writes rows as records in the order asked for: the work of `gsm8k-prep`.

use super::Row;
use super::order::RowOrder;
use super::prompt::PromptStyle;
use super::source::RowStream;
use crate::error::Result;
use crate::lines::jsonl::Output;

/// Writes the records of `rows`. Returns how many rows it skipped because they lack an answer, or the reasoning that a demonstration needs.
///
/// Rows stream through if the order keeps that of the file; a shuffle reads them all first.
///
/// # Errors
/// The errors of the rows, the order and the output.
pub fn prepare(rows: RowStream, order: &RowOrder, style: &PromptStyle, out: &mut Output) -> Result<usize> {
    order.check()?;
    let mut skipped = 0;
    let split = order.split.published();
    let mut answered = rows.filter(|row| {
        let skip = row.as_ref().is_ok_and(|row| !style.suits(row));
        skipped += usize::from(skip);
        !skip
    });
    let mut write = |row: &Row, epoch| match style.record(row, split, epoch) {
        Some(record) => out.write_line(&record),
        None => Ok(()),
    };
    if order.is_natural() {
        answered.by_ref().take(order.limit.unwrap_or(usize::MAX)).try_for_each(|row| write(&row?, 0))?;
    } else {
        let rows = answered.by_ref().collect::<Result<Vec<Row>>>()?;
        order.all(rows.len())?.into_iter().try_for_each(|(place, epoch)| write(&rows[place], epoch))?;
    }
    drop(answered);
    Ok(skipped)
}
