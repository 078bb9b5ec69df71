package bill

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The file that a user starts from is the one in testdata, and every built-in
// table reads back as it was written.
func TestWriteLoad(t *testing.T) {
	golden, err := os.ReadFile(filepath.Join("testdata", "aws-arm64.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if got := Default().YAML(); !bytes.Equal(got, golden) {
		t.Errorf("the default table is written as\n%s\nwant\n%s", got, golden)
	}
	for _, want := range Tables() {
		path := filepath.Join(t.TempDir(), "prices.yaml")
		if err := Write(path, want); err != nil {
			t.Fatal(err)
		}
		got, err := Load(path)
		if err != nil || *got != *want {
			t.Errorf("%s reads back as %+v, %v", want.Name, got, err)
		}
		if err := Write(path, Default()); err == nil || !strings.Contains(err.Error(), "exists") {
			t.Errorf("a second file in its place: %v", err)
		}
		if again, err := Load(path); err != nil || *again != *want {
			t.Errorf("the refused write left %+v, %v", again, err)
		}
	}
}

func TestParseBase(t *testing.T) {
	got, err := Parse([]byte("base: aws-x86_64\npeer_hour_usd: 5e-2\ngigabyte_out_usd: 0\n"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := Builtin("aws-x86_64")
	if err != nil {
		t.Fatal(err)
	}
	want.Name, want.Notes, want.PeerHour, want.GBOut = "aws-x86_64, changed", "", USD/20, 0
	if *got != *want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// What is wrong is named with its line, and so is the mend.
func TestParseErrors(t *testing.T) {
	all := string(Default().YAML())
	without := func(key string) string {
		var out []string
		for _, l := range strings.Split(all, "\n") {
			if !strings.HasPrefix(l, key+":") {
				out = append(out, l)
			}
		}
		return strings.Join(out, "\n")
	}
	for text, want := range map[string]string{
		"":                                            "spirt prices --write",
		"- 1":                                         "spirt prices --write",
		"# only this":                                 "spirt prices --write",
		"name: a\n---\nname: b":                       "spirt prices --write",
		"name: [":                                     "[1:",
		"base: aws-arm64\npeer_hour: 1":               "line 2: \"peer_hour\" is unknown: is it peer_hour_usd?",
		"base: aws-arm64\nGB_SECOND_USD: 1":           "is it gb_second_usd?",
		"base: aws-amr64":                             "line 1: base: there are no prices \"aws-amr64\": take aws-arm64",
		"base: 7":                                     "there are no prices \"7\"",
		"base: [local]":                               "line 1: base: there is no text",
		"base: local\ncurrency: EUR":                  "line 2: currency: only USD is known",
		"base: local\ndate: May 2026":                 "line 2: date: \"May 2026\" is no date: write it as 2026-01-31",
		"base: local\nname: \"\"":                     "line 2: name is empty",
		"base: local\nrequest_usd: -1":                "line 2: request_usd: -1 is below 0",
		"base: local\nrequest_usd: 11":                "line 2: request_usd: $11.00 is more than the $10.00",
		"base: local\nrequest_usd: 1e300":             "no amount in US dollars",
		"base: local\nrequest_usd: 1e-13":             "finer than the smallest amount",
		"base: local\nrequest_usd: .inf":              "is no number",
		"base: local\nrequest_usd: .nan":              "is no number",
		"base: local\nrequest_usd: \"1\"":             "is no number: write one such as",
		"base: local\nrequest_usd: 0x1":               "with decimal digits",
		"base: local\nrequest_usd: 010":               "with decimal digits",
		"base: local\nrequest_usd: 1_0":               "write",
		"base: local\nrequest_usd: 1\nrequest_usd: 2": "request_usd",
		without("name"):                               "name is missing: say what is priced",
		without("date"):                               "date is missing",
		without("source"):                             "source is missing",
		without("currency"):                           "currency is missing: write currency: USD",
		without("gigabyte_out_usd"):                   "gigabyte_out_usd is missing: write 0 for what costs nothing",
		"notes: \xff":                                 "UTF-8",
		strings.Repeat(" ", maxFile+1):                "more than the 16384 bytes",
		"base: local\nnotes: " + strings.Repeat("n", maxText+1): "line 2: notes: 1001 bytes",
	} {
		got, err := Parse([]byte(text))
		if err == nil {
			t.Errorf("%.60q is read as %+v", text, got)
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v; want %s", text, err, want)
		}
	}
	if _, err := Parse([]byte(without("notes"))); err != nil {
		t.Errorf("without notes: %v", err)
	}
}

func TestOpen(t *testing.T) {
	t.Chdir(t.TempDir())
	if p, err := Open("local"); err != nil || p.Name != "local" || p.Cost(Usage{1, 1, 1, 1, 1}).Total() != 0 {
		t.Errorf("local: %+v, %v", p, err)
	}
	if _, err := Open("aws-arm"); err == nil || !strings.Contains(err.Error(), "take aws-arm64") {
		t.Errorf("an unknown name: %v", err)
	}
	if _, err := Open(""); err == nil {
		t.Error("no name is a table")
	}
	if _, err := Open("none.yaml"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no such file: %v", err)
	}
	if err := os.WriteFile("mine", []byte("base: local\nname: mine\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if p, err := Open("mine"); err != nil || p.Name != "mine" {
		t.Errorf("a file without an ending: %+v, %v", p, err)
	}
	if err := os.WriteFile("bad.yaml", []byte("pric: 1"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open("bad.yaml"); err == nil || !strings.Contains(err.Error(), "bad.yaml: line 1") {
		t.Errorf("a bad file: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(Default().YAML())
	f.Add([]byte("base: local\npeer_hour_usd: 1.5e-3"))
	f.Add([]byte("base: aws-arm64\nname: &a x\nsource: *a\nnotes: |\n  two\n  lines"))
	f.Add([]byte("? [a]\n: b"))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := Parse(text)
		if err != nil {
			return
		}
		for _, l := range prices() {
			if m := *l.of(p); m < 0 || m > l.most {
				t.Errorf("%s is %v", l.key, m)
			}
		}
		again, err := Parse(p.YAML())
		if err != nil || *again != *p {
			t.Errorf("%+v is written as\n%s\nwhich reads as %+v, %v", p, p.YAML(), again, err)
		}
	})
}
