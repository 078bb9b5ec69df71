package tensordb

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt/optim"
)

const commandsPage = "../docs/commands.md"

// commandsMarkdown renders the table of commands.
func commandsMarkdown() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("# The commands of the tensor database")
	line("")
	line("[tensordb.md](tensordb.md) says how to connect, what tokens allow, and what errors and bounds there are.")
	line("This page is made from the table that the server obeys; `COMMAND DOCS` answers from it too. Names and words such as IFNOT are")
	line("taken in any case. In complexities, n is the number of elements. A token must allow the access, and cover every key.")
	line("")
	var groups []string
	for _, c := range Commands() {
		if !slices.Contains(groups, c.Group) {
			groups = append(groups, c.Group)
		}
	}
	for _, g := range groups {
		line("- [%s](#%s)", g, anchor(g))
	}
	line("- [Optimizers and options](#optimizers-and-options)")
	for _, g := range groups {
		line("\n## %s", g)
		for _, c := range Commands() {
			if c.Group != g {
				continue
			}
			line("\n### %s\n", c.Name)
			line("    %s\n", c.Usage())
			line("%s\n", c.Summary)
			line("| Reply | Access | Complexity | Keys |")
			line("|---|---|---|---|")
			line("| %s | %s | %s | %s |", cell(c.Reply), accessName(c), cell(c.Complexity), keysOf(c))
		}
	}
	b.WriteString(optimizersMarkdown)
	return b.String()
}

func anchor(heading string) string { return strings.ReplaceAll(strings.ToLower(heading), " ", "-") }

func cell(s string) string { return strings.ReplaceAll(s, "|", `\|`) }

func accessName(c *Command) string {
	if c.stranger {
		return "without a token"
	}
	switch c.Access {
	case ReadOnly:
		return "read"
	case Function:
		return "function"
	}
	return "all"
}

func keysOf(c *Command) string {
	if c.FirstKey == 0 {
		return "none"
	}
	where := fmt.Sprintf("arguments %d to %d", c.FirstKey, c.LastKey)
	switch {
	case c.LastKey == c.FirstKey:
		return fmt.Sprintf("argument %d", c.FirstKey)
	case c.LastKey < 0:
		where = fmt.Sprintf("arguments from %d", c.FirstKey)
	}
	if c.KeyStep > 1 {
		where += fmt.Sprintf(", each %dnd", c.KeyStep)
	}
	return where
}

func TestCommandsPage(t *testing.T) {
	want := commandsMarkdown()
	if *regenerate {
		if err := os.WriteFile(commandsPage, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(commandsPage)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Error("docs/commands.md is not what the table of commands says: run go test ./tensordb -run CommandsPage -regenerate")
	}
}

// Every command says all that the page and COMMAND DOCS tell.
func TestCommandsAreDescribed(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range Commands() {
		if c.Name != strings.ToUpper(c.Name) || c.Summary == "" || c.Reply == "" || c.Group == "" || c.Complexity == "" || c.Min < 1 || len(c.Name) > longestName || seen[c.Name] {
			t.Errorf("%+v is not described, or twice", c)
		}
		if c.Max > 0 && c.Max < c.Min || c.LastKey >= c.Min && c.Max == c.Min || c.ServerOnly() != (c.run == nil) || c.run == nil && c.serve == nil {
			t.Errorf("%s: arguments %d to %d, keys %d to %d", c.Name, c.Min, c.Max, c.FirstKey, c.LastKey)
		}
		seen[c.Name] = true
	}
}

// optimizersMarkdown is the part that is not in the table of commands.
const optimizersMarkdown = `
## Optimizers and options

After STEP n stand the optimizer, LR and a positive number, and options in any order, none twice. The conventions, and the defaults, are PyTorch's.

| Optimizer | Options | State, in vectors as long as the parameters |
|---|---|---|
| SGD | MOMENTUM m, NESTEROV, WEIGHTDECAY wd | none; 1 with momentum |
| ADAM | BETA1 b, BETA2 b, EPS eps, WEIGHTDECAY wd | 2 |
| ADAMW | BETA1 b, BETA2 b, EPS eps, WEIGHTDECAY wd | 2 |
| RMSPROP | ALPHA a, EPS eps, MOMENTUM m, WEIGHTDECAY wd | 1; 2 with momentum |
| ADAGRAD | EPS eps, WEIGHTDECAY wd | 1 |

Each also takes the course of the learning rate:

| Option | The learning rate |
|---|---|
| WARMUP steps | rises over the first steps |
| SCHEDULE CONSTANT | stays |
| SCHEDULE LINEAR total cooldown [min] | falls in the last ` + "`cooldown`" + ` of ` + "`total`" + ` steps |
| SCHEDULE COSINE total [min] | falls along a cosine over ` + "`total`" + ` steps |
| SCHEDULE STEP every gamma | is multiplied by gamma every so many steps |
| SCHEDULE EXPONENTIAL gamma | is multiplied by gamma each step |
`

// What the page says of optimizers is what they take.
func TestOptimizersPage(t *testing.T) {
	for name, want := range map[string]int{
		"SGD": 0, "SGD MOMENTUM 0.9 NESTEROV WEIGHTDECAY 0.1": 1,
		"ADAM BETA1 0.9 BETA2 0.9 EPS 1e-8 WEIGHTDECAY 0.1": 2, "ADAMW BETA1 0.9 BETA2 0.9 EPS 1e-8 WEIGHTDECAY 0.1": 2,
		"RMSPROP ALPHA 0.9 EPS 1e-8 WEIGHTDECAY 0.1": 1, "RMSPROP MOMENTUM 0.9": 2, "ADAGRAD EPS 1e-8 WEIGHTDECAY 0.1": 1,
	} {
		for _, schedule := range []string{"", "WARMUP 2", "SCHEDULE CONSTANT", "SCHEDULE LINEAR 10 5 0.1", "SCHEDULE COSINE 10", "SCHEDULE STEP 2 0.5", "SCHEDULE EXPONENTIAL 0.5"} {
			config, err := optim.ParseArgs(append(strings.Fields(name+" LR 0.1"), strings.Fields(schedule)...))
			if err != nil {
				t.Errorf("%s %s: %v", name, schedule, err)
			} else if n := config.StateLen(10); n != 10*want {
				t.Errorf("%s has a state of %d numbers, not %d", name, n, 10*want)
			}
		}
	}
}
