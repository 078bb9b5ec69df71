package spirt

import (
	"bytes"
	_ "embed" // the annotated default job and the schema
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"github.com/spirt-ml/spirt/internal/spell"
	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/optim"
)

// Bounds of a job file, which has some thirty lines and as many comments.
const (
	maxJobText    = 64 << 10 // bytes
	maxJobEntries = 200      // keys with a value
	maxJobErrors  = 8        // told at once
)

//go:embed docs/job.yaml
var defaultJobFile string

//go:embed docs/job.schema.json
var jobSchema string

// DefaultJobFile returns a job file that says what the default job says, with
// every field explained.
func DefaultJobFile() string { return defaultJobFile }

// JobSchema returns the JSON Schema of job files, for editors.
func JobSchema() string { return jobSchema }

// JobFile is a job as a file says it.
type JobFile struct {
	// Job has what stands in the file; what does not is zero until Resolve.
	Job Job

	path  string
	lines []string
	at    map[string]token.Position // of the values, by field
}

// ReadJobFile reads a job file. Its error tells all that is wrong with the
// text, each with line and column, and what was meant where that can be
// guessed. It does not look at ranges: Resolve does.
func ReadJobFile(path string) (*JobFile, error) {
	b, err := readFile(path, maxJobText)
	if err != nil {
		return nil, err
	}
	return parseJobFile(path, b)
}

// LoadJob reads a job file and resolves it.
func LoadJob(path string) (Job, error) {
	f, err := ReadJobFile(path)
	if err != nil {
		return Job{}, err
	}
	j := f.Job
	return j, f.Locate(j.Resolve())
}

// parseJob reads the text of a job file and resolves the job.
func parseJob(b []byte) (Job, error) {
	f, err := parseJobFile(jobFile, b)
	if err != nil {
		return Job{}, err
	}
	j := f.Job
	return j, f.Locate(j.Resolve())
}

// Locate adds the place in the file to an error about a field, such as one of
// Resolve, and the nearest value that would do. Other errors, and those about
// fields that are not in the file, it returns as they are.
func (f *JobFile) Locate(err error) error {
	field := FieldOf(err)
	at, ok := f.at[field]
	if !ok {
		return err
	}
	return f.fault(&at, "%w%s", err, f.Job.MeantBy(field))
}

// FieldOf returns the field that an error is about, such as "peers" or
// "functions.timeout": "" if it is about none. Errors about a job begin with it.
func FieldOf(err error) string {
	if err == nil {
		return ""
	}
	name, _, _ := strings.Cut(err.Error(), ":")
	if _, ok := findField(name); !ok {
		return ""
	}
	return name
}

// jobField is a leaf of Job.
type jobField struct {
	name  string // as in files and errors: functions.timeout
	index []int  // for reflect
	kind  reflect.Type
}

// jobFields returns the fields of a job in the order of the struct.
func jobFields() (all []jobField) {
	var walk func(t reflect.Type, prefix string, index []int)
	walk = func(t reflect.Type, prefix string, index []int) {
		for i := range t.NumField() {
			f := t.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
			at := append(slices.Clone(index), i)
			if f.Type.Kind() == reflect.Struct {
				walk(f.Type, prefix+name+".", at)
				continue
			}
			all = append(all, jobField{prefix + name, at, f.Type})
		}
	}
	walk(reflect.TypeFor[Job](), "", nil)
	return all
}

func findField(name string) (jobField, bool) {
	all := jobFields()
	i := slices.IndexFunc(all, func(f jobField) bool { return f.name == name })
	if i < 0 {
		return jobField{}, false
	}
	return all[i], true
}

// isGroup reports whether fields stand below a name, such as functions.
func isGroup(name string) bool {
	return slices.ContainsFunc(jobFields(), func(f jobField) bool { return strings.HasPrefix(f.name, name+".") })
}

// fieldValues returns what a field of text may say: nil where that is no short list.
func fieldValues(field string) []string {
	switch field {
	case "model":
		return nn.Names()
	case "optimizer":
		return []string{optim.Adam, optim.SGD}
	case "shards":
		return []string{shardsEpoch, shardsFixed}
	case "codec":
		return []string{codecFloat32, codecFloat16}
	case "functions.kind":
		return []string{functionsProcesses, functionsDatabase}
	}
	return nil
}

// MeantBy returns a question to add to an error about a field: did you mean
// this value. It is "" where nothing is near.
func (j *Job) MeantBy(field string) string {
	f, ok := findField(field)
	if !ok || f.kind.Kind() != reflect.String {
		return ""
	}
	v := reflect.ValueOf(j).Elem().FieldByIndex(f.index).String()
	known := fieldValues(field)
	if field == "data" {
		known = []string{"mnist-10k"}
	}
	if v == "" || slices.Contains(known, v) || strings.HasPrefix(v, "idx:") {
		return ""
	}
	return didYouMean(nearest(v, known, func(s string) string {
		switch s {
		case "lenet", "lenet-5", "le_net":
			return "lenet5"
		case "convnet", "conv":
			return "cnn"
		case "linear", "logreg", "softmax":
			return "logistic"
		case "dense", "perceptron":
			return "mlp"
		case "momentum":
			return optim.SGD
		case "adamw":
			return optim.Adam
		case "fp16", "half", "f16":
			return codecFloat16
		case "fp32", "single", "f32", "none":
			return codecFloat32
		case "private":
			return shardsFixed
		case "shuffled", "public":
			return shardsEpoch
		case "process", "lambda", "serverless":
			return functionsProcesses
		case "db", "redis", "tensordb":
			return functionsDatabase
		case "mnist", "digits":
			return "mnist-10k"
		}
		return ""
	}))
}

// synonym returns the field that other programs call by this name.
func synonym(key string) string {
	switch key {
	case "learning_rate", "step_size", "eta", "alpha":
		return "lr"
	case "batch", "minibatch", "minibatch_size", "mini_batch_size", "per_device_train_batch_size":
		return "batch_size"
	case "accumulate_grad_batches", "gradient_accumulation_steps", "batches":
		return "batches_per_round"
	case "epochs", "max_epochs", "num_epochs", "steps", "max_steps", "iterations":
		return "rounds"
	case "optim", "optimiser":
		return "optimizer"
	case "dataset", "data_dir", "train_data":
		return "data"
	case "arch", "architecture", "network", "net":
		return "model"
	case "workers", "nodes", "world_size", "num_workers", "clients", "replicas":
		return "peers"
	case "faulty", "attackers", "f":
		return "byzantine"
	case "random_seed", "random_state", "seed_everything":
		return "seed"
	case "early_stopping", "early_stopping_patience", "n_iter_no_change":
		return "patience"
	case "val_check_interval", "check_val_every_n_epoch", "eval_steps", "validation_freq", "eval_every":
		return "validate_every"
	case "save_steps", "save_freq", "every_n_epochs", "save_every":
		return "checkpoint_every"
	case "target", "stop_at", "accuracy":
		return "target_accuracy"
	case "timeout", "function_timeout":
		return "functions.timeout"
	case "memory", "memory_size", "ram":
		return "functions.memory_mb"
	case "max_concurrency", "parallel", "parallelism":
		return "functions.concurrency"
	case "duration", "time_limit", "time":
		return "max_time"
	case "budget", "max_cost", "cost":
		return "budget_usd"
	case "compression", "precision":
		return "codec"
	case "warmdown", "decay":
		return "cooldown"
	case "tol", "threshold":
		return "min_delta"
	}
	return ""
}

// fault is an error at a place of the file, with the line and a caret.
func (f *JobFile) fault(at *token.Position, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	line := min(max(at.Line, 1), len(f.lines))
	text := []rune(f.lines[line-1])
	column := min(max(at.Column, 1), len(text)+1)
	const shown = 100 // characters of the line
	from := max(0, column-1-shown/2)
	if column <= shown {
		from = 0
	}
	number := strconv.Itoa(line)
	blank := strings.Repeat(" ", len(number))
	return fmt.Errorf("%s:%d:%d: %w\n  %s | %s\n  %s | %s^", f.path, line, column, err,
		number, printable(string(text[from:min(len(text), from+shown)])), blank, strings.Repeat(" ", column-1-from))
}

// printable replaces what a terminal would obey, one character for one.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case unicode.IsPrint(r):
			return r
		}
		return '\uFFFD'
	}, s)
}

func parseJobFile(path string, b []byte) (*JobFile, error) {
	switch {
	case bytes.HasPrefix(b, []byte("\xFF\xFE")), bytes.HasPrefix(b, []byte("\xFE\xFF")):
		return nil, fmt.Errorf("%s: the text is UTF-16: save it as UTF-8", path)
	case len(b) > maxJobText:
		return nil, fmt.Errorf("%s has more than the %d bytes it may have", path, maxJobText)
	}
	b = bytes.TrimPrefix(b, []byte("\uFEFF")) // as editors on Windows write it
	text := strings.ReplaceAll(string(b), "\r\n", "\n")
	f := &JobFile{path: path, lines: strings.Split(strings.ReplaceAll(text, "\r", "\n"), "\n"), at: map[string]token.Position{}}
	if bad := slices.IndexFunc([]rune(text), func(r rune) bool {
		return r < ' ' && r != '\n' && r != '\t' && r != '\r' || r == utf8.RuneError || r == 0x7F
	}); bad >= 0 || !utf8.ValidString(text) {
		before := string([]rune(text)[:max(bad, 0)])
		at := token.Position{Line: strings.Count(before, "\n") + 1, Column: utf8.RuneCountInString(before[strings.LastIndexByte(before, '\n')+1:]) + 1}
		if utf8.ValidString(text) && !strings.ContainsRune(text, utf8.RuneError) {
			return nil, f.fault(&at, "a control character, U+%04X: remove it", []rune(text)[bad])
		}
		return nil, f.fault(&at, "the text is not UTF-8: save it as UTF-8")
	}
	if err := f.checkTokens(lexer.Tokenize(text)); err != nil {
		return nil, err
	}
	file, err := parser.ParseBytes([]byte(text), 0, parser.AllowDuplicateMapKey())
	if err != nil {
		return nil, f.syntax(err)
	}
	var wrong []error
	for _, doc := range file.Docs {
		wrong = append(wrong, f.mapping(doc.Body, "")...)
	}
	if n := len(wrong); n > maxJobErrors {
		wrong = append(wrong[:maxJobErrors], fmt.Errorf("and %d more", n-maxJobErrors))
	}
	return f, errors.Join(wrong...)
}

// checkTokens refuses what no job file needs before the parser sees it, which
// takes long over some of it.
func (f *JobFile) checkTokens(tokens token.Tokens) error {
	entries, depth, content, ended := 0, 0, false, false
	for _, t := range tokens {
		refuse := func(format string, args ...any) error { return f.fault(t.Position, format, args...) }
		switch t.Type {
		case token.CommentType:
			continue
		case token.DocumentHeaderType:
			if content || ended {
				return refuse("a second YAML document: only one may stand in a job file")
			}
			content = true
			continue
		case token.DocumentEndType:
			ended = true
			continue
		case token.DirectiveType:
			return refuse("directives have no use in a job file: remove the line")
		case token.AnchorType, token.AliasType, token.MergeKeyType:
			return refuse("anchors, aliases and merges have no use in a job file: write the value out")
		case token.TagType:
			return refuse("tags such as %.20s have no use in a job file: write the plain value", t.Value)
		case token.SequenceStartType, token.SequenceEndType, token.SequenceEntryType:
			return refuse("a job file has no lists, but a name and a value on each line, such as peers: 4")
		case token.MappingKeyType:
			return refuse("a job file has no keys with a question mark: write name: value")
		case token.MappingStartType:
			if depth++; depth > 2 {
				return refuse("braces within braces within braces: a job has nothing that deep")
			}
		case token.MappingEndType:
			depth--
		case token.MappingValueType:
			if entries++; entries > maxJobEntries {
				return refuse("more than %d entries: this is no job file", maxJobEntries)
			}
		}
		if ended {
			return refuse("a second YAML document: only one may stand in a job file")
		}
		content = true
	}
	return nil
}

// syntax gives an error of the YAML library the form of ours.
func (f *JobFile) syntax(err error) error {
	var e yaml.Error
	if errors.As(err, &e) && e.GetToken() != nil && e.GetToken().Position != nil {
		return f.fault(e.GetToken().Position, "this is not YAML: %s", printable(e.GetMessage()))
	}
	return fmt.Errorf("%s: this is not YAML: %s", f.path, printable(err.Error()))
}

// mapping takes the entries of a mapping, the fields of which have a prefix,
// and returns all that is wrong with them.
func (f *JobFile) mapping(n ast.Node, prefix string) (wrong []error) {
	var pairs []*ast.MappingValueNode
	switch n := n.(type) {
	case nil, *ast.CommentGroupNode, *ast.NullNode: // nothing is said: the defaults hold
		return nil
	case *ast.MappingNode:
		pairs = n.Values
	case *ast.MappingValueNode:
		pairs = []*ast.MappingValueNode{n}
	default:
		what := "a job file has a name and a value on each line, such as peers: 4"
		if prefix != "" {
			what = fmt.Sprintf("%s has fields of its own: write them below it, indented", strings.TrimSuffix(prefix, "."))
		}
		return []error{f.fault(n.GetToken().Position, "%s", what)}
	}
	first := map[string]int{}
	for _, pair := range pairs {
		at := pair.Key.GetToken().Position
		key, ok := pair.Key.(*ast.StringNode)
		if !ok {
			wrong = append(wrong, f.fault(at, "%.40s is no name of a field", printable(pair.Key.String())))
			continue
		}
		name := prefix + key.Value
		if line := first[name]; line > 0 {
			wrong = append(wrong, f.fault(at, "%s stands here again, after line %d: keep one of them", name, line))
			continue
		}
		first[name] = at.Line
		if field, ok := findField(name); ok {
			v := at
			if pair.Value != nil && pair.Value.GetToken() != nil {
				v = pair.Value.GetToken().Position
			}
			if err := f.value(field, pair.Value); err != nil {
				wrong = append(wrong, f.fault(v, "%s: %w", name, err))
			}
			f.at[name] = *v
			continue
		}
		if isGroup(name) {
			wrong = append(wrong, f.mapping(pair.Value, name+".")...)
			continue
		}
		wrong = append(wrong, f.fault(at, "%.60s is no field of a job%s", printable(strconv.Quote(name)), meantField(prefix, key.Value)))
	}
	return wrong
}

// meantField returns a question after the field that a wrong name means.
func meantField(prefix, key string) string {
	key = strings.ReplaceAll(strings.ToLower(key), "-", "_")
	var here, all []string
	for _, field := range jobFields() {
		all = append(all, field.name)
		if rest, ok := strings.CutPrefix(field.name, prefix); ok {
			here = append(here, rest)
		}
	}
	if to := nearest(key, here, func(string) string { return "" }); to != "" {
		return didYouMean(prefix + to)
	}
	for _, name := range all { // the right name in the wrong place
		if name == key || strings.HasSuffix(name, "."+key) {
			return didYouMean(name)
		}
	}
	return didYouMean(nearest(key, all, synonym))
}

func didYouMean(what string) string {
	if what == "" {
		return ""
	}
	return "; did you mean " + what + "?"
}

// nearest returns the known word that was meant: the same in another case, the
// one that is called so elsewhere, or the one with the fewest wrong letters, a
// third of them at most; "" if there is none.
func nearest(word string, known []string, synonym func(string) string) string {
	if len(word) > 64 {
		return ""
	}
	word = strings.ToLower(word)
	if slices.Contains(known, word) {
		return word
	}
	if s := synonym(word); s != "" {
		return s
	}
	best, fewest := "", max(1, len(word)/3)+1
	for _, k := range known {
		if d := spell.Distance(word, k); d < fewest && d < len(k) {
			best, fewest = k, d
		}
	}
	return best
}

// value sets a field to what stands in the file. Zero would mean the default,
// so it is refused where the default is something else that is not derived
// from other fields.
func (f *JobFile) value(field jobField, n ast.Node) error {
	dst := reflect.ValueOf(&f.Job).Elem().FieldByIndex(field.index)
	switch n := n.(type) {
	case nil, *ast.NullNode:
		return errors.New("it has no value: write one, or leave the line out for the default")
	case *ast.MappingNode, *ast.MappingValueNode:
		return fmt.Errorf("it takes %s, not fields of its own", takes(field))
	case *ast.StringNode, *ast.LiteralNode:
		text := ""
		if s, ok := n.(*ast.StringNode); ok {
			text = s.Value
		} else {
			text = n.(*ast.LiteralNode).Value.Value
		}
		if number, ok := plainNumber(n); ok && field.kind.Kind() != reflect.String && field.kind != reflect.TypeFor[time.Duration]() {
			if err := setNumber(dst, field, number); err != nil {
				return err
			}
		} else if err := setText(dst, field, text); err != nil {
			return err
		}
	default:
		if err := setNumber(dst, field, n); err != nil {
			return err
		}
	}
	if dst.IsZero() && !zeroMeans(field.name) {
		def := DefaultJob()
		return fmt.Errorf("%v is out of range: leave the line out for the default, %v", dst, reflect.ValueOf(def).FieldByIndex(field.index))
	}
	return nil
}

// zeroMeans reports whether zero is a value of a field: that something is off,
// or that it follows from others.
func zeroMeans(field string) bool {
	switch field {
	case "byzantine", "cooldown":
		return true
	}
	def := DefaultJob()
	f, ok := findField(field)
	return ok && f.kind.Kind() != reflect.String && reflect.ValueOf(def).FieldByIndex(f.index).IsZero()
}

// takes says what kind of value a field has.
func takes(field jobField) string {
	switch {
	case field.kind == reflect.TypeFor[time.Duration]():
		return "a time with its unit, such as 90s or 2m"
	case field.kind.Kind() == reflect.String:
		if v := fieldValues(field.name); v != nil {
			return strings.Join(v[:len(v)-1], ", ") + " or " + v[len(v)-1]
		}
		return "text"
	case field.kind.Kind() == reflect.Float32 || field.kind.Kind() == reflect.Float64:
		return "a number"
	}
	return "a whole number"
}

// plainNumber returns a number that the YAML library takes for text, such as
// 1e3, as the number that it is in YAML 1.2.
func plainNumber(n ast.Node) (ast.Node, bool) {
	t := n.GetToken()
	if t.Type != token.StringType || t.Value == "" || strings.Trim(t.Value, "0123456789eE.+-") != "" {
		return nil, false
	}
	v, err := strconv.ParseFloat(t.Value, 64)
	if err != nil {
		return nil, false
	}
	return &ast.FloatNode{BaseNode: &ast.BaseNode{}, Token: t, Value: v}, true
}

func setText(dst reflect.Value, field jobField, text string) error {
	switch {
	case field.kind == reflect.TypeFor[time.Duration]():
		d, err := time.ParseDuration(text)
		if err != nil {
			return fmt.Errorf("%.40q is not a time: write a number and its unit, such as 90s or 2m", text)
		}
		dst.SetInt(int64(d))
	case field.kind.Kind() == reflect.String:
		dst.SetString(text)
	default:
		return fmt.Errorf("%.40q is text, it takes %s", text, takes(field))
	}
	return nil
}

func setNumber(dst reflect.Value, field jobField, n ast.Node) error {
	text := n.GetToken().Value
	var whole any // int64 or uint64
	var number float64
	switch n := n.(type) {
	case *ast.IntegerNode:
		whole = n.Value
		switch v := n.Value.(type) {
		case int64:
			number = float64(v)
		case uint64:
			number = float64(v)
		}
	case *ast.FloatNode:
		number = n.Value
	case *ast.InfinityNode:
		number = n.Value
	case *ast.NanNode:
		number = math.NaN()
	default:
		return fmt.Errorf("%.40s is not %s", printable(text), takes(field))
	}
	switch kind := field.kind.Kind(); {
	case field.kind == reflect.TypeFor[time.Duration]():
		if number == 0 {
			dst.SetInt(0)
			return nil
		}
		return fmt.Errorf("%.40s has no unit: write %.40ss for seconds, or m for minutes, h for hours", text, text)
	case kind == reflect.String:
		return fmt.Errorf("%.40s is a number, it takes %s; text that looks like a number stands in quotes", text, takes(field))
	case kind == reflect.Float32 || kind == reflect.Float64:
		if number-number != 0 {
			return fmt.Errorf("%v is not a finite number", number)
		}
		if kind == reflect.Float32 {
			// Rounded once, so that what was written is read.
			small := float32(number)
			if v, err := strconv.ParseFloat(strings.ReplaceAll(text, "_", ""), 32); err == nil {
				small = float32(v)
			}
			if small-small != 0 || small == 0 && number != 0 {
				return fmt.Errorf("%.40s is out of range of a number with 32 bits", text)
			}
			number = float64(small)
		}
		dst.SetFloat(number)
		return nil
	}
	if whole == nil {
		if number != math.Trunc(number) {
			return fmt.Errorf("%.40s is not a whole number", text)
		}
		if math.Abs(number) > 1<<53 { // beyond it not every whole number is one
			return fmt.Errorf("%.40s is out of range", text)
		}
		whole = int64(number)
	}
	switch dst.Kind() {
	case reflect.Uint64:
		switch v := whole.(type) {
		case uint64:
			dst.SetUint(v)
			return nil
		case int64:
			if v >= 0 {
				dst.SetUint(uint64(v))
				return nil
			}
		}
	default:
		switch v := whole.(type) {
		case int64:
			if !dst.OverflowInt(v) {
				dst.SetInt(v)
				return nil
			}
		case uint64:
			if v <= math.MaxInt64 && !dst.OverflowInt(int64(v)) {
				dst.SetInt(int64(v))
				return nil
			}
		}
	}
	return fmt.Errorf("%.40s is out of range", text)
}
