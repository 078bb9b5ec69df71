package spirt

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

// regenerate has tests write anew what they compare with.
var regenerate = flag.Bool("regenerate", false, "write docs/job.yaml, docs/job.schema.json and docs/job.md anew")

// bounds are what Resolve takes of a number, both included. above is a bound
// that is not included.
type bounds struct{ min, max, above *float64 }

// jobBounds returns the bounds of a field that has some. The test of the
// schema has Resolve agree with each of them.
func jobBounds(field string) bounds {
	between := func(lo, hi float64) bounds { return bounds{min: &lo, max: &hi} }
	zero, one := 0.0, 1.0
	switch field {
	case "peers":
		return between(1, maxPeers)
	case "byzantine":
		return between(0, (maxPeers-1)/3)
	case "lr":
		return bounds{above: &zero}
	case "batch_size":
		return between(1, maxBatchSize)
	case "batches_per_round":
		return between(1, maxBatchesPerRound)
	case "rounds":
		return between(1, maxRounds)
	case "cooldown":
		return between(-1, maxRounds)
	case "target_accuracy":
		return between(0, 1)
	case "validate_every", "seed":
		return bounds{min: &one}
	case "functions.concurrency":
		return between(1, 1024)
	case "functions.memory_mb":
		return between(32, 10240)
	case "checkpoint_every":
		return between(1, 1<<20)
	case "patience":
		return between(0, 1<<20)
	case "min_delta", "budget_usd":
		return between(0, 1e6)
	case "speed", "pause_after":
		return bounds{min: &zero}
	}
	return bounds{}
}

// units returns the unit of a field that has one.
func units(field string) string {
	switch field {
	case "batch_size":
		return "samples"
	case "batches_per_round":
		return "minibatches"
	case "rounds", "cooldown", "validate_every", "checkpoint_every", "pause_after":
		return "rounds"
	case "patience":
		return "validations"
	case "functions.memory_mb":
		return "MiB"
	case "functions.concurrency":
		return "instances"
	case "budget_usd":
		return "US dollars"
	case "speed":
		return "minibatches a second"
	}
	return ""
}

// described is a field with its comment, for people: names are those of files.
type described struct {
	jobField
	text string
}

// describe reads the comments of the fields of Job and of what it holds.
func describe(t testing.TB) []described {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "job.go", nil, parser.ParseComments)
	check(t, err)
	type field struct{ goName, text string }
	fields := map[string]field{} // by name in files
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok || spec.Name.Name != "Job" && spec.Name.Name != "Functions" {
			return true
		}
		prefix := map[string]string{"Job": "", "Functions": "functions."}[spec.Name.Name]
		for _, f := range spec.Type.(*ast.StructType).Fields.List {
			tag, _ := strconv.Unquote(f.Tag.Value)
			name, _, _ := strings.Cut(reflect.StructTag(tag).Get("yaml"), ",")
			fields[prefix+name] = field{f.Names[0].Name, strings.Join(strings.Fields(f.Doc.Text()), " ")}
		}
		return false
	})
	// A Go name in the middle of a sentence is a field; at the start of one it
	// may be a word. The first word of a comment is its own field.
	word := regexp.MustCompile(`(^|[^.] |\()([A-Z][A-Za-z]+)`)
	var out []described
	for _, f := range jobFields() {
		d, ok := fields[f.name]
		if !ok || d.text == "" {
			t.Fatalf("%s has no comment in job.go", f.name)
		}
		text := word.ReplaceAllStringFunc(d.text, func(s string) string {
			m := word.FindStringSubmatch(s)
			for name, other := range fields {
				if other.goName == m[2] {
					return m[1] + name[strings.LastIndexByte(name, '.')+1:]
				}
			}
			return s
		})
		out = append(out, described{f, text})
	}
	return out
}

// span says what a field takes, for people.
func span(f jobField) string {
	number := func(v float64) string { return strconv.FormatFloat(v, 'f', -1, 64) }
	b, what := jobBounds(f.name), takes(f)
	switch {
	case f.name == "data":
		what = "mnist-10k, or idx: and a folder"
	case f.name == "functions.timeout":
		what += ", from 1s to 15m"
	case f.name == "max_time":
		what += ", from 1s, or 0"
	case b.above != nil:
		what += " above " + number(*b.above)
	case b.min != nil && b.max != nil:
		what += " from " + number(*b.min) + " to " + number(*b.max)
	case b.min != nil:
		what += " from " + number(*b.min)
	}
	if u := units(f.name); u != "" {
		what += ", " + u
	}
	return what
}

// defaultText is the default of a field as text. What follows from other fields
// stays zero.
func defaultText(f jobField) string {
	if f.name == "functions.kind" {
		return functionsProcesses
	}
	v := reflect.ValueOf(DefaultJob()).FieldByIndex(f.index)
	switch {
	case f.name == "byzantine" || f.name == "cooldown":
		return "0"
	case f.kind == reflect.TypeFor[time.Duration]():
		if v.Int() == 0 {
			return "0"
		}
		return strings.Replace(v.Interface().(time.Duration).String(), "m0s", "m", 1)
	}
	return fmt.Sprint(v)
}

// wrapComment breaks text into lines of a comment.
func wrapComment(b *strings.Builder, indent, text string) {
	line := indent + "#"
	for word := range strings.FieldsSeq(text) {
		if len(line)+1+len(word) > 80 {
			b.WriteString(line + "\n")
			line = indent + "#"
		}
		line += " " + word
	}
	b.WriteString(line + "\n")
}

func annotated(all []described) string {
	var b strings.Builder
	b.WriteString("# What is trained, on what, by how many peers and for how long. These are the\n" +
		"# defaults: change what you want, leave out what you do not, and run\n" +
		"#   spirt train job.yaml\n" +
		"# Flags of that command go before what stands here.\n" +
		"#\n" +
		"# For help while you type: spirt init --schema > job.schema.json, and make this\n" +
		"# the first line, for editors with the YAML language server:\n" +
		"#   # yaml-language-server: $schema=job.schema.json\n")
	group := ""
	for _, f := range all {
		indent, key := "", f.name
		if g, rest, ok := strings.Cut(f.name, "."); ok {
			if g != group {
				fmt.Fprintf(&b, "\n# The function instances of each peer.\n%s:\n", g)
			} else {
				b.WriteByte('\n')
			}
			group, indent, key = g, "  ", rest
		} else {
			b.WriteByte('\n')
		}
		wrapComment(&b, indent, f.text)
		wrapComment(&b, indent, "Takes "+span(f.jobField)+".")
		fmt.Fprintf(&b, "%s%s: %s\n", indent, key, defaultText(f.jobField))
	}
	return b.String()
}

// schemaNode is a part of a JSON Schema, in the order in which it is written.
type schemaNode struct {
	Schema           string          `json:"$schema,omitempty"`
	ID               string          `json:"$id,omitempty"`
	Title            string          `json:"title,omitempty"`
	Description      string          `json:"description,omitempty"`
	Type             any             `json:"type,omitempty"`
	Enum             []string        `json:"enum,omitempty"`
	Pattern          string          `json:"pattern,omitempty"`
	MinLength        int             `json:"minLength,omitempty"`
	Minimum          *float64        `json:"minimum,omitempty"`
	ExclusiveMinimum *float64        `json:"exclusiveMinimum,omitempty"`
	Maximum          json.RawMessage `json:"maximum,omitempty"`
	Default          json.RawMessage `json:"default,omitempty"`
	Const            json.RawMessage `json:"const,omitempty"`
	AnyOf            []schemaNode    `json:"anyOf,omitempty"`
	Additional       *bool           `json:"additionalProperties,omitempty"`
	Properties       *properties     `json:"properties,omitempty"`
	If               *schemaNode     `json:"if,omitempty"`
	Then             *schemaNode     `json:"then,omitempty"`
	Required         []string        `json:"required,omitempty"`
}

// properties keeps its order.
type properties struct {
	names []string
	nodes []*schemaNode
}

func (p *properties) add(name string, n *schemaNode) {
	p.names, p.nodes = append(p.names, name), append(p.nodes, n)
}

func (p *properties) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	for i, name := range p.names {
		v, err := json.Marshal(p.nodes[i])
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "%c%q:%s", "{,"[min(i, 1)], name, v)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// duration is what time.ParseDuration takes.
const duration = `^[-+]?(0|(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+)$`

func schemaOf(t testing.TB, all []described) string {
	t.Helper()
	closed, zero, one := false, 0.0, 1.0
	root := &schemaNode{
		Schema: "https://json-schema.org/draft/2020-12/schema", Title: "SPIRT job file", Type: []string{"object", "null"}, Additional: &closed, Properties: &properties{},
		Description: "What is trained, on what, by how many peers and for how long. Bounds that depend on other fields, and those of times, are checked when the file is loaded.",
		If:          &schemaNode{Required: []string{"min_delta"}, Properties: &properties{}}, Then: &schemaNode{Required: []string{"patience"}, Properties: &properties{}},
	}
	root.If.Properties.add("min_delta", &schemaNode{ExclusiveMinimum: &zero})
	root.Then.Properties.add("patience", &schemaNode{Minimum: &one})
	groups := map[string]*schemaNode{}
	for _, f := range all {
		n := &schemaNode{Description: f.text, Default: json.RawMessage(defaultText(f.jobField))}
		if u := units(f.name); u != "" {
			n.Description += " In " + u + "."
		}
		b := jobBounds(f.name)
		n.Minimum, n.ExclusiveMinimum = b.min, b.above
		if b.max != nil {
			n.Maximum = json.RawMessage(strconv.FormatFloat(*b.max, 'f', -1, 64))
		}
		switch {
		case f.kind == reflect.TypeFor[time.Duration]():
			n.Type, n.Pattern = "string", duration
			if zeroMeans(f.name) {
				n.Type, n.Pattern, n.AnyOf = nil, "", []schemaNode{{Type: "string", Pattern: duration}, {Const: json.RawMessage("0")}}
			} else {
				n.Default = json.RawMessage(strconv.Quote(defaultText(f.jobField)))
			}
		case f.kind.Kind() == reflect.String:
			n.Type, n.Enum = "string", fieldValues(f.name)
			if f.name == "data" {
				n.MinLength = 1
			}
			n.Default = json.RawMessage(strconv.Quote(defaultText(f.jobField)))
		case f.kind.Kind() == reflect.Float32 || f.kind.Kind() == reflect.Float64:
			n.Type = "number"
			if f.kind.Kind() == reflect.Float32 {
				n.Maximum = json.RawMessage(strconv.FormatFloat(math.MaxFloat32, 'g', -1, 32))
			}
			if f.name == "speed" {
				n.Maximum = json.RawMessage("999999999")
			}
		default:
			n.Type = "integer"
			if f.kind.Kind() == reflect.Uint64 {
				n.Maximum = json.RawMessage(strconv.FormatUint(math.MaxUint64, 10))
			}
			if n.Minimum == nil {
				t.Fatalf("%s has no bounds: give it some in jobBounds", f.name)
			}
		}
		if g, rest, ok := strings.Cut(f.name, "."); ok {
			if groups[g] == nil {
				groups[g] = &schemaNode{Description: "The function instances of each peer.", Type: []string{"object", "null"}, Additional: &closed, Properties: &properties{}}
				root.Properties.add(g, groups[g])
			}
			groups[g].Properties.add(rest, n)
			continue
		}
		root.Properties.add(f.name, n)
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	check(t, e.Encode(root))
	return b.String()
}

const jobPage = `# The job file

A job file says what is trained, on what, by how many peers and for how long. ` + "`spirt init job.yaml`" + ` writes one with every field explained,
` + "`spirt train job.yaml`" + ` and ` + "`spirt job create --job job.yaml DIR`" + ` take it. What a file leaves out has its default; flags that are given go before
what stands in the file. The run folder keeps the job with every default filled in as ` + "`job.yaml`" + `, which is a job file too.

` + "```yaml" + `
model: cnn
peers: 7
lr: 1e-3
rounds: 2_000
patience: 5          # ends early when five validations brought nothing
functions:
  timeout: 2m
` + "```" + `

The file is YAML in UTF-8, one document of 64 KiB at most, with names and values and nothing else: no lists, anchors, tags or merges. Each name stands once.
Whole numbers may be written as 1000, 1e3 or 1_000, times with their unit as 90s, 2m or 1h30m. A field is left out to have its default; zero is a value only where
the table says so. What is wrong is told with its place and, where it can be guessed, with what was meant:

` + "```" + `
$ spirt train job.yaml
spirt: job.yaml:2:1: "learning_rate" is no field of a job; did you mean lr?
  2 | learning_rate: 0.1
    | ^
` + "```" + `

` + "`spirt init --schema > job.schema.json`" + ` writes a [JSON Schema](job.schema.json), draft 2020-12. Editors with the YAML language server complete and check a file whose first line is

` + "```yaml" + `
# yaml-language-server: $schema=job.schema.json
` + "```" + `

## Fields

This table is made from the comments in ` + "`job.go`" + `.

| Field | Takes | Default | Meaning |
|---|---|---|---|
`

func jobPageOf(all []described) string {
	var b strings.Builder
	b.WriteString(jobPage)
	for _, f := range all {
		fmt.Fprintf(&b, "| `%s` | %s | `%s` | %s |\n", f.name, span(f.jobField), defaultText(f.jobField), f.text)
	}
	b.WriteString("\nAll peers of a job have the same one: every field is part of its name, the job's ID.\n")
	return b.String()
}

// What is embedded and what people read are made from the comments of Job.
func TestJobFilePages(t *testing.T) {
	all := describe(t)
	for path, want := range map[string]string{
		filepath.Join("docs", "job.yaml"):        annotated(all),
		filepath.Join("docs", "job.schema.json"): schemaOf(t, all),
		filepath.Join("docs", "job.md"):          jobPageOf(all),
	} {
		if *regenerate {
			check(t, os.WriteFile(path, []byte(want), 0o644))
		}
		got, err := os.ReadFile(path)
		check(t, err)
		if strings.ReplaceAll(string(got), "\r\n", "\n") != want {
			t.Errorf("%s is not what the comments in job.go say: run go test . -run JobFilePages -regenerate", path)
		}
	}
}

// The file that init writes says every field, and what it says is the default.
func TestDefaultJobFile(t *testing.T) {
	f, err := parseJobFile("job.yaml", []byte(DefaultJobFile()))
	check(t, err)
	for _, field := range jobFields() {
		if _, ok := f.at[field.name]; !ok {
			t.Errorf("%s is not in it", field.name)
		}
	}
	check(t, f.Job.Resolve())
	if f.Job != DefaultJob() {
		t.Errorf("got  %+v\nwant %+v", f.Job, DefaultJob())
	}
	for _, line := range strings.Split(DefaultJobFile(), "\n") {
		if len(line) > 80 {
			t.Errorf("a line of %d characters: %s", len(line), line)
		}
	}
}

// The schema and the parser with Resolve say the same.
func TestJobSchema(t *testing.T) {
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(JobSchema()))
	check(t, err)
	c := jsonschema.NewCompiler()
	check(t, c.AddResource("job.schema.json", doc))
	schema, err := c.Compile("job.schema.json")
	check(t, err)
	agree := func(text string, good bool) {
		t.Helper()
		// Numbers as they stand: a float64 does not hold all of them.
		j, err := yaml.YAMLToJSON([]byte(text))
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader(j))
		check(t, err)
		told := schema.Validate(v)
		if (told == nil) != good {
			t.Errorf("%q: the schema says %v, want good %v", text, told, good)
		}
		if _, err := parseJob([]byte(text)); (err == nil) != good {
			t.Errorf("%q: the parser says %v, want good %v", text, err, good)
		}
	}
	agree(DefaultJobFile(), true)
	resolved, err := yaml.Marshal(DefaultJob())
	check(t, err)
	agree(string(resolved), true)
	put := func(field, value string) string {
		switch g, rest, ok := strings.Cut(field, "."); {
		case ok:
			return g + ":\n  " + rest + ": " + value + "\n"
		// What the bounds of these depend on.
		case field == "byzantine":
			return "peers: 64\nbyzantine: " + value + "\n"
		case field == "cooldown":
			return "rounds: 2147483647\ncooldown: " + value + "\n"
		case field == "min_delta":
			return "patience: 1\nmin_delta: " + value + "\n"
		}
		return field + ": " + value + "\n"
	}
	number := func(v float64) string { return strconv.FormatFloat(v, 'f', -1, 64) }
	for _, f := range jobFields() {
		b := jobBounds(f.name)
		whole := f.kind.Kind() == reflect.Int || f.kind.Kind() == reflect.Uint64
		step := 0.001
		if whole {
			step = 1
			agree(put(f.name, "7.5"), false)
		}
		if b.min != nil {
			agree(put(f.name, number(*b.min)), true)
			agree(put(f.name, number(*b.min-step)), false)
		}
		if b.max != nil {
			agree(put(f.name, number(*b.max)), true)
			agree(put(f.name, number(*b.max+step)), false)
		}
		if b.above != nil {
			agree(put(f.name, number(*b.above)), false)
			agree(put(f.name, number(*b.above-step)), false)
			agree(put(f.name, number(*b.above+step)), true)
		}
		for _, v := range fieldValues(f.name) {
			agree(put(f.name, v), true)
			agree(put(f.name, v+"x"), false)
		}
		if f.kind.Kind() != reflect.String {
			agree(put(f.name, "many"), false)
		} else {
			agree(put(f.name, "5"), false)
			agree(put(f.name, `""`), false)
		}
		agree(put(f.name, "true"), false)
		agree(put(f.name, "null"), false)
		agree(put(f.name, "{x: 1}"), false)
		agree(put(f.name+"x", "1"), false)
	}
	for text, good := range map[string]bool{
		"functions:\n": true, "functions: {}\n": true, "functions: 5\n": false,
		"functions: {timeout: 90s}\n": true, "functions: {timeout: 90}\n": false, "functions: {timeout: long}\n": false, "functions: {timeout: 1m30.5s}\n": true,
		"max_time: 0\n": true, "max_time: 1h\n": true, "max_time: 3600\n": false, "max_time: -1\n": false,
		"min_delta: 0.1\n": false, "min_delta: 0\n": true, "min_delta: 0.1\npatience: 2\n": true, "min_delta: 0.1\npatience: 0\n": false,
		"seed: 18446744073709551615\n": true, "seed: 18446744073709551616\n": false,
	} {
		agree(text, good)
	}
}

// Each error has the place, the line with a caret, and what was meant.
func TestJobFileErrors(t *testing.T) {
	for text, says := range map[string][]string{
		"peers: 4\nlearning_rate: 0.1\n": {"job.yaml:2:1: \"learning_rate\" is no field of a job; did you mean lr?\n  2 | learning_rate: 0.1\n    | ^"},
		"batch: 4\n":                     {"job.yaml:1:1", "did you mean batch_size?"},
		"epochs: 4\n":                    {"did you mean rounds?"},
		"roudns: 4\n":                    {"did you mean rounds?"},
		"Batch-Size: 4\n":                {"did you mean batch_size?"},
		"patiense: 4\n":                  {"did you mean patience?"},
		"memory_mb: 64\n":                {"did you mean functions.memory_mb?"},
		"functions:\n  peers: 2\n":       {"job.yaml:2:3: \"functions.peers\"", "did you mean peers?"},
		"functions: {memory: 64}\n":      {"job.yaml:1:13", "did you mean functions.memory_mb?"},
		"entirely_else: 1\n":             {"\"entirely_else\" is no field of a job\n"},
		"model: lenet\n":                 {"job.yaml:1:8: model: ", "did you mean lenet5?\n  1 | model: lenet\n    |        ^"},
		"model: resnet18\n":              {"job.yaml:1:8: model: "},
		"optimizer: Adam\n":              {"did you mean adam?"},
		"optimizer: sdg\n":               {"did you mean sgd?"},
		"codec: fp16\n":                  {"did you mean float16?"},
		"shards: epochs\n":               {"did you mean epoch?"},
		"functions:\n  kind: process\n":  {"job.yaml:2:9: functions.kind: ", "did you mean processes?"},
		"# x\n\npeers:   65 # many\n":    {"job.yaml:3:10: peers: 65 is out of range: take 1 to 64\n  3 | peers:   65 # many\n    |          ^"},
		"peers: 0\n":                     {"job.yaml:1:8: peers: 0 is out of range: leave the line out for the default, 4"},
		"lr: 1e-300\n":                   {"job.yaml:1:5: lr: 1e-300 is out of range of a number with 32 bits"},
		"peers: 4\npeers: 5\n":           {"job.yaml:2:1: peers stands here again, after line 1"},
		"peers:\n":                       {"peers: it has no value"},
		"peers: {a: 1}\n":                {"peers: it takes a whole number, not fields of its own"},
		"functions: 3\n":                 {"job.yaml:1:12: functions has fields of its own"},
		"functions:\n  timeout: 60\n":    {"job.yaml:2:12: functions.timeout: 60 has no unit: write 60s"},
		"model: 5\n":                     {"5 is a number, it takes cnn, lenet5, logistic or mlp"},
		"peers: yes please\n":            {"peers: \"yes please\" is text, it takes a whole number"},
		"a: 1\nb: 2\n":                   {"job.yaml:1:1", "job.yaml:2:1"}, // both are told
		"data: &x a\n":                   {"job.yaml:1:7: anchors, aliases"},
		"<<: {a: 1}\n":                   {"job.yaml:1:1: anchors"},
		"peers: !!int 4\n":               {"job.yaml:1:8: tags"},
		"peers: 4\n---\npeers: 5\n":      {"job.yaml:2:1: a second YAML document"},
		"peers: 4\n...\npeers: 5\n":      {"job.yaml:3:1: a second YAML document"},
		"%YAML 1.2\n---\npeers: 4\n":     {"job.yaml:1:1: directives"},
		"peers: 4\nmod\xFFel: mlp\n":     {"job.yaml:2:4: the text is not UTF-8"},
		"\xFF\xFEp\x00e\x00":             {"UTF-16"},
		"peers: 4\x1b[2J\n":              {"job.yaml:1:9: a control character, U+001B"},
		"peers 4\n":                      {"job.yaml:1:1: a job file has a name and a value"},
		"peers: \"4\n":                   {"job.yaml:1:8: this is not YAML: "},
		strings.Repeat("x: {", 3):        {"braces within braces"},
		strings.Repeat("x: 1\n", 201):    {"job.yaml:201:2: more than 200 entries"},
		strings.Repeat("x: 1\n", 20):     {"and 12 more"},
		strings.Repeat(" ", 70_000):      {"more than the 65536 bytes"},
		"data: " + strings.Repeat("é", 200) + "\npeers: 65": {"job.yaml:2:8"},
		"data: \"" + strings.Repeat("é", 200) + "\" x":      {"job.yaml:1:"},
	} {
		f, err := parseJobFile("job.yaml", []byte(text))
		if err == nil {
			err = f.Locate(f.Job.Resolve())
		}
		if err == nil {
			t.Errorf("accepted: %.60q", text)
			continue
		}
		refused(t, err, says...)
	}
	for text, peers := range map[string]int{
		"\uFEFFpeers: 7\r\nlr: 0.1\r\n": 7, "": 4, "# only this\n": 4, "---\npeers: 9\n...\n": 9, "{peers: 6, lr: 0.1}": 6, "peers: 1_0\n": 10, "peers: 1e1\n": 10, "null\n": 4,
	} {
		if j, err := parseJob([]byte(text)); err != nil || j.Peers != peers {
			t.Errorf("%q: %d peers, %v", text, j.Peers, err)
		}
	}
}

// Every error of Resolve begins with a field, so that its place can be told.
func TestFieldOf(t *testing.T) {
	for text, want := range map[string]string{
		"peers: 65": "peers", "byzantine: 2": "byzantine", "lr: -1": "lr", "cooldown: 401": "cooldown", "functions: {timeout: 1ms}": "functions.timeout",
		"min_delta: 1": "min_delta", "max_time: 1ms": "max_time", "pause_after: 1": "pause_after", "speed: -1": "speed", "budget_usd: -1": "budget_usd",
		"optimizer: x": "optimizer", "model: x": "model",
	} {
		f, err := parseJobFile("job.yaml", []byte(text))
		check(t, err)
		if err := f.Job.Resolve(); FieldOf(err) != want {
			t.Errorf("%s: the error %v is about %q", text, err, FieldOf(err))
		}
	}
	if got := FieldOf(os.ErrNotExist); got != "" {
		t.Errorf("%q", got)
	}
}
