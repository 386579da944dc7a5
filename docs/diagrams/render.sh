#!/usr/bin/env bash
# Renders docs/diagrams/*.mmd to the SVG files beside them, which the site and GitHub show; nothing is rendered in the reader's browser.
# Needs node and a Chromium; CHROME names another one. The tool comes from the npm registry and is not part of this repository.
set -euo pipefail
cd "$(dirname "$0")"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cat >"$scratch/browser.json" <<JSON
{"executablePath": "${CHROME:-/usr/bin/chromium}", "args": ["--no-sandbox"]}
JSON
for source in *.mmd; do
    name=${source%.mmd}
    PUPPETEER_SKIP_DOWNLOAD=1 npx --yes @mermaid-js/mermaid-cli@11 --quiet --puppeteerConfigFile "$scratch/browser.json" \
        --configFile mermaid.json --backgroundColor white --svgId "diagram-$name" --input "$source" --output "$scratch/$name.svg"
    # A test compares this line with the source, so that a picture cannot be older than its text.
    { cat "$scratch/$name.svg"; printf '\n<!-- source sha256 %s -->\n' "$(sha256sum <"$source" | cut -d' ' -f1)"; } >"$name.svg"
done
