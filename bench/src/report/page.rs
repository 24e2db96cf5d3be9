//! The report as one HTML page that needs nothing else.

use std::fmt::Write;

use serde_json::Value;

use super::plot::{escape, number};
use super::{Figure, Group, Ratio, Table};

const STYLE: &str = "
:root { color-scheme: light dark; --ground: #fbfaf7; --card: #ffffff; --ink: #1d1f24; --soft: #5d6470;
  --rule: #dfe0e4; --good: #1a7f4e; --bad: #b3402a;
  --c0: #2563b8; --c1: #d2691e; --c2: #2a8f6b; --c3: #8a4fae; --c4: #b59410; --c5: #6b7280; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171c; --card: #1e2128; --ink: #e8e9ec; --soft: #a0a7b4; --rule: #343944;
    --good: #56c28d; --bad: #f0907a;
    --c0: #6ea8f2; --c1: #f0a060; --c2: #5fc7a0; --c3: #c49ae0; --c4: #dcc055; --c5: #9aa2af; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 21px; margin: 44px 0 8px; }
h3 { font-size: 16px; margin: 0 0 4px; }
p { margin: 0 0 10px; } .soft, dt, figcaption + details { color: var(--soft); }
a { color: var(--c0); }
nav a { margin-right: 14px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; font-size: 14px; }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0 0 20px; padding: 16px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; }
figcaption { margin-top: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg .label, svg .value { fill: var(--ink); }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 2; } .limit { stroke-dasharray: 5 4; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; margin: 4px 0; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
.f0 { fill: var(--c0); } .f1 { fill: var(--c1); } .f2 { fill: var(--c2); }
.f3 { fill: var(--c3); } .f4 { fill: var(--c4); } .f5 { fill: var(--c5); }
.b0 { background: var(--c0); } .b1 { background: var(--c1); } .b2 { background: var(--c2); }
.b3 { background: var(--c3); } .b4 { background: var(--c4); } .b5 { background: var(--c5); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th:first-child, td:first-child, .ratios td:last-child, .ratios th:last-child { text-align: left; }
.good { color: var(--good); } .bad { color: var(--bad); }
";

/// The page. `machine` is what [`super::machine::describe`] says.
pub fn render(machine: &Value, groups: &[Group]) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>\
         <meta name='viewport' content='width=device-width, initial-scale=1'>\
         <title>curling-rdma: measured</title><style>{STYLE}</style></head><body><main>\n\
         <h1>curling-rdma: measured</h1>\n<p class='soft'>How long the guest stands still, how far \
         the backup is behind, what it costs the guest's work, and how fast a failover is; each \
         beside what limits it on this machine.</p>\n"
    );
    page.push_str("<nav><p>");
    for group in groups {
        let _ = write!(page, "<a href='#{}'>{}</a>", group.name, group.name);
    }
    page.push_str("</p></nav>\n");
    ratios(&mut page, groups);
    for group in groups {
        section(&mut page, group);
    }
    page.push_str("<h2>Measured on</h2>\n<dl>");
    for (name, value) in machine.as_object().into_iter().flatten() {
        let _ = write!(
            page,
            "<dt>{}</dt><dd>{}</dd>",
            escape(&name.replace('_', " ")),
            escape(&plain(value))
        );
    }
    page.push_str("</dl>\n</main></body></html>\n");
    page
}

fn ratios(page: &mut String, groups: &[Group]) {
    page.push_str(
        "<h2>Beside the limits</h2>\n<div class='scroll'><table class='ratios'><tr><th>ratio</th>\
         <th>measured</th><th>wanted</th><th></th><th>what it is</th></tr>",
    );
    for ratio in groups.iter().flat_map(|group| &group.ratios) {
        let Ratio {
            name,
            value,
            bound,
            meaning,
        } = ratio;
        let (class, word) = if ratio.is_reached() {
            ("good", "reached")
        } else {
            ("bad", "not reached")
        };
        let _ = write!(
            page,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td class='{class}'>{word}</td><td>{}</td></tr>",
            escape(name),
            number(*value),
            bound.text(),
            escape(meaning)
        );
    }
    page.push_str("</table></div>\n");
}

fn section(page: &mut String, group: &Group) {
    let _ = writeln!(page, "<h2 id='{}'>{}</h2>", group.name, escape(group.title));
    for Figure {
        heading,
        plot,
        sentence,
        table: numbers,
    } in &group.figures
    {
        let _ = write!(
            page,
            "<figure><h3>{}</h3>{plot}<figcaption>{}</figcaption>",
            escape(heading),
            escape(sentence)
        );
        table(page, numbers);
        page.push_str("</figure>\n");
    }
    for reason in &group.missing {
        let _ = writeln!(page, "<p class='soft'>Not measured: {}</p>", escape(reason));
    }
}

fn table(page: &mut String, table: &Table) {
    if table.rows.is_empty() {
        return;
    }
    let row = |tag: &str, cells: &[String]| {
        let cells = cells
            .iter()
            .map(|cell| format!("<{tag}>{}</{tag}>", escape(cell)));
        format!("<tr>{}</tr>", cells.collect::<String>())
    };
    page.push_str("<details><summary>the numbers</summary><div class='scroll'><table>");
    page.push_str(&row("th", &table.head));
    for cells in &table.rows {
        page.push_str(&row("td", cells));
    }
    page.push_str("</table></div></details>");
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join("; "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{Bound, plot};
    use super::*;

    #[test]
    fn page_needs_no_network_and_has_both_looks() {
        let mut numbers = Table::new(["pages", "µs"]);
        numbers.row(["16".into(), "20".into()]);
        let group = Group {
            name: "link",
            title: "The link",
            figures: vec![Figure {
                heading: "How fast".into(),
                plot: plot::bars("µs", &["push"], &[]),
                sentence: "It is <fast>.".into(),
                table: numbers,
            }],
            ratios: vec![Ratio {
                name: "push".into(),
                value: 1.5,
                bound: Bound::AtMost(1.2),
                meaning: "a / b".into(),
            }],
            ..Group::default()
        };
        let page = render(&json!({ "cpu": "x", "qemu": ["a", "b"] }), &[group]);
        for word in [
            "prefers-color-scheme: dark",
            "<svg",
            "not reached",
            "It is &lt;fast&gt;",
            "a; b",
        ] {
            assert!(page.contains(word), "{word}");
        }
        for outside in ["http:", "https:", "src=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
    }
}
