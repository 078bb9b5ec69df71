package bill

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"github.com/spirt-ml/spirt/internal/spell"
)

// Limits of a file of prices.
const (
	maxFile = 16 << 10 // bytes; the YAML library is slow on long nonsense
	maxText = 1000     // bytes of a name, source or notes
)

// A price is one line of a file of prices.
type price struct {
	key   string
	of    func(*Table) *Money
	most  Money // what is above is a slip
	about string
}

// prices are the lines of a file of prices that are amounts, in their order.
func prices() []price {
	return []price{
		{"gb_second_usd", func(t *Table) *Money { return &t.GBSecond }, USD, "a function's memory in GiB times its billed seconds"},
		{"request_usd", func(t *Table) *Money { return &t.Request }, 10 * USD, "one invocation"},
		{"peer_hour_usd", func(t *Table) *Money { return &t.PeerHour }, 10000 * USD, "the machine of a peer, with a database in its process"},
		{"database_hour_usd", func(t *Table) *Money { return &t.DBHour }, 10000 * USD, "the machine of a database on its own"},
		{"gigabyte_out_usd", func(t *Table) *Money { return &t.GBOut }, 1000 * USD, "1e9 bytes sent from peer to peer"},
	}
}

// YAML returns the table as Load reads it.
func (t *Table) YAML() []byte {
	var b strings.Builder
	b.WriteString("# Prices for spirt train, bill and plan (--prices FILE). Amounts are US dollars; what is finer than\n" +
		"# 0.000000000001 is rounded. With a line \"base: aws-arm64\" what is left out is as in that table.\n")
	line := func(key, text string) {
		q, err := yaml.Marshal(text)
		if err != nil { // a string has a form in YAML
			q = []byte(strconv.Quote(text) + "\n")
		}
		fmt.Fprintf(&b, "%s: %s", key, q)
	}
	line("name", t.Name)
	fmt.Fprintf(&b, "date: %q\n", t.Date)
	line("source", t.Source)
	if t.Notes != "" {
		line("notes", t.Notes)
	}
	b.WriteString("currency: USD\n")
	for _, p := range prices() {
		fmt.Fprintf(&b, "%-18s %-14s # %s\n", p.key+":", p.of(t).Decimal(), p.about)
	}
	return []byte(b.String())
}

// Load reads a table from a file. With `base: NAME` what the file leaves out is
// taken from that built-in table; else all of it has to be there, notes aside.
// Errors name the line and the mend.
func Load(path string) (*Table, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("prices: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("prices: %w", err)
	}
	t, err := Parse(b)
	if err != nil {
		return nil, fmt.Errorf("prices %s: %w", path, err)
	}
	return t, nil
}

// Parse reads a table from the text of a file.
func Parse(text []byte) (*Table, error) {
	switch {
	case len(text) > maxFile:
		return nil, fmt.Errorf("more than the %d bytes that a file of prices may have", maxFile)
	case !utf8.Valid(text):
		return nil, errors.New("it is no text in UTF-8")
	}
	file, err := parse(text)
	if err != nil {
		return nil, err
	}
	if len(file.Docs) != 1 || file.Docs[0].Body == nil {
		return nil, errors.New("there are no prices in it: `spirt prices --write` makes a file to start from")
	}
	fields, err := fieldsOf(file.Docs[0].Body)
	if err != nil {
		return nil, err
	}
	return fields.table()
}

// parse is the library's parser, which must not end this process whatever the
// file holds.
func parse(text []byte) (f *ast.File, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("the file cannot be read as YAML: %.100v", r)
		}
	}()
	if f, err = parser.ParseBytes(text, 0); err != nil {
		lines := strings.Split(strings.TrimSpace(yaml.FormatError(err, false, true)), "\n")
		for i, l := range lines {
			lines[i] = strings.ToValidUTF8(strings.Map(printable, l[:min(len(l), 200)]), "")
		}
		return nil, errors.New(strings.Join(lines, "\n"))
	}
	return f, nil
}

// A field is a value of a file and where it stands.
type field struct {
	value ast.Node
	line  int
}

type fields map[string]field

// fieldsOf returns the lines of a file, each key once.
func fieldsOf(body ast.Node) (fields, error) {
	var pairs []*ast.MappingValueNode
	switch n := body.(type) {
	case *ast.MappingNode:
		pairs = n.Values
	case *ast.MappingValueNode:
		pairs = []*ast.MappingValueNode{n}
	default:
		return nil, errors.New("it holds no lines of `key: value`: `spirt prices --write` makes a file to start from")
	}
	known := []string{"base", "name", "date", "source", "notes", "currency"}
	for _, p := range prices() {
		known = append(known, p.key)
	}
	out := fields{}
	for _, pair := range pairs {
		key, line := pair.Key.String(), pair.Key.GetToken().Position.Line
		nearest := known[0]
		for _, k := range known {
			if spell.Distance(key, k) < spell.Distance(key, nearest) {
				nearest = k
			}
		}
		if key != nearest {
			return nil, fmt.Errorf("line %d: %.40q is unknown: is it %s? There are %s", line, key, nearest, strings.Join(known, ", "))
		}
		if before, twice := out[key]; twice {
			return nil, fmt.Errorf("line %d: %s stands in line %d already: remove one", line, key, before.line)
		}
		out[key] = field{pair.Value, line}
	}
	return out, nil
}

// table makes a table of the lines.
func (f fields) table() (*Table, error) {
	t := &Table{}
	base := false
	if v, ok := f["base"]; ok {
		name, err := v.text("base")
		if err != nil {
			return nil, err
		}
		b, err := Builtin(name)
		if err != nil {
			return nil, fmt.Errorf("line %d: base: %w", v.line, err)
		}
		// The text of the base is about the base.
		t, base = b, true
		t.Name, t.Notes = b.Name+", changed", ""
	}
	missing := func(key, mend string) error {
		return fmt.Errorf("%s is missing: %s, or have what is left out from a built-in table with `base: %s`", key, mend, DefaultName)
	}
	if v, ok := f["currency"]; ok {
		if c, err := v.text("currency"); err != nil || c != "USD" {
			return nil, fmt.Errorf("line %d: currency: only USD is known: write the prices in US dollars", v.line)
		}
	} else if !base {
		return nil, missing("currency", "write currency: USD, and the prices in US dollars")
	}
	for _, s := range []struct {
		key  string
		to   *string
		mend string
	}{
		{"name", &t.Name, "say what is priced"},
		{"date", &t.Date, "say of when the prices are, as 2026-01-31"},
		{"source", &t.Source, "say where the prices stand"},
		{"notes", &t.Notes, ""},
	} {
		v, ok := f[s.key]
		if !ok {
			if !base && s.mend != "" {
				return nil, missing(s.key, s.mend)
			}
			continue
		}
		text, err := v.text(s.key)
		if err != nil {
			return nil, err
		}
		if text == "" && s.mend != "" {
			return nil, fmt.Errorf("line %d: %s is empty: %s", v.line, s.key, s.mend)
		}
		*s.to = text
	}
	if _, err := time.Parse(time.DateOnly, t.Date); err != nil {
		return nil, fmt.Errorf("line %d: date: %.40q is no date: write it as 2026-01-31", f["date"].line, t.Date)
	}
	for _, p := range prices() {
		v, ok := f[p.key]
		if !ok {
			if !base {
				return nil, missing(p.key, "write 0 for what costs nothing")
			}
			continue
		}
		m, err := v.money()
		if err == nil && m > p.most {
			err = fmt.Errorf("%v is more than the %v that can be right: the unit is %s", m, p.most, p.about)
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %s: %w", v.line, p.key, err)
		}
		*p.of(t) = m
	}
	return t, nil
}

// text returns a value that is text, or a date.
func (f field) text(key string) (string, error) {
	var s string
	switch n := f.value.(type) {
	case *ast.StringNode:
		s = n.Value
	case *ast.LiteralNode:
		s = n.Value.Value
	case *ast.IntegerNode, *ast.FloatNode:
		s = n.GetToken().Value
	default:
		return "", fmt.Errorf("line %d: %s: there is no text: write some, in quotes if need be", f.line, key)
	}
	if s = strings.TrimSpace(s); len(s) > maxText {
		return "", fmt.Errorf("line %d: %s: %d bytes are more than the %d it may have", f.line, key, len(s), maxText)
	}
	return strings.Map(printable, s), nil
}

// printable replaces what a terminal obeys.
func printable(r rune) rune {
	if unicode.IsControl(r) {
		return ' '
	}
	return r
}

// money returns a value that is an amount.
func (f field) money() (Money, error) {
	text := strings.TrimSpace(f.value.GetToken().Value)
	switch n := f.value.(type) {
	case *ast.IntegerNode, *ast.FloatNode:
	case *ast.StringNode: // so the library reads 5e-2
		if _, err := strconv.ParseFloat(text, 64); n.Token.Type == token.StringType && (err == nil || errors.Is(err, strconv.ErrRange)) {
			break
		}
		return 0, fmt.Errorf("%.40q is no number: write one such as 0.0168, without quotes", text)
	default:
		return 0, fmt.Errorf("%.40q is no number: write one such as 0.0168", f.value.String())
	}
	if strings.HasPrefix(text, "-") {
		return 0, fmt.Errorf("%.40s is below 0: nothing has a negative price here", text)
	}
	// YAML has more ways to write a number, and one of them means another.
	whole, rest := text, ""
	if i := strings.IndexAny(text, ".eE"); i >= 0 {
		whole, rest = text[:i], text[i:]
	}
	if strings.Trim(whole, "0123456789") != "" || strings.Trim(rest, "0123456789.eE+-") != "" || whole == "" || len(whole) > 1 && whole[0] == '0' {
		return 0, fmt.Errorf("%.40q: write it with decimal digits, such as 0.0168", text)
	}
	m, err := ParseMoney(text)
	if err == nil && m == 0 && strings.ContainsAny(strings.SplitN(strings.ToLower(text), "e", 2)[0], "123456789") {
		err = fmt.Errorf("%.40s is finer than the smallest amount, 0.000000000001: write 0, or more", text)
	}
	return m, err
}
