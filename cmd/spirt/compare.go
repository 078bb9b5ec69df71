package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/chart"
	"github.com/spirt-ml/spirt/events"
)

func compareCommand(stdout io.Writer) *cobra.Command {
	var target float64
	var plot string
	var asJSON, asCSV bool
	c := &cobra.Command{
		Use:   "compare RUN RUN ...",
		Short: "What differs between runs: their jobs, and what came of them",
		Long: "Compare reads the folders of two or more runs, also while they train: in what their jobs and\n" +
			"machines differ, accuracy, loss, time, where the time went, and cost, each by its own prices.\n" +
			"The curves are over each other, in the terminal and with --plot in a picture.",
		Example: "  spirt compare runs/adam runs/sgd\n  spirt compare runs/* --target 0.95 --plot curves.svg\n  spirt compare runs/adam runs/sgd --csv > table.csv",
		Args:    cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			switch ext := strings.ToLower(filepath.Ext(plot)); {
			case len(args) < 2:
				return usage(errors.New("compare needs two run folders or more: `spirt runs` lists them (see `spirt compare --help`)"))
			case asJSON && asCSV:
				return usage(errors.New("--json and --csv: take one"))
			case plot != "" && ext != ".svg" && ext != ".png":
				return usage(fmt.Errorf("--plot %s is no name of a picture: let it end in .svg or .png", clean(plot)))
			case c.Flags().Changed("target") && target == 0:
				return usage(errors.New("--target 0 is reached by every run: take a fraction above 0 (0.97 for 97 %)"))
			}
			r, err := spirt.CompareRuns(args, target)
			if err != nil {
				return legible(err)
			}
			curves := r.Chart()
			if plot != "" {
				if err := chart.WriteFile(plot, curves); err != nil {
					return err
				}
			}
			switch {
			case asJSON:
				return json.NewEncoder(stdout).Encode(r)
			case asCSV:
				return r.WriteCSV(stdout)
			}
			_, err = io.WriteString(stdout, compared(r, curves, textWidth(stdout)))
			return err
		},
	}
	f := c.Flags()
	f.Float64Var(&target, "target", 0, "tell when a validation first had this accuracy, a fraction such as 0.97")
	f.StringVar(&plot, "plot", "", "draw the learning curves into this file, .svg or .png, which is replaced")
	f.BoolVar(&asJSON, "json", false, "write one JSON object")
	f.BoolVar(&asCSV, "csv", false, "write a line of comma-separated values for each run")
	return c
}

// textWidth is how wide a text may be.
func textWidth(w io.Writer) int {
	const usual, most = 80, 120
	if f, ok := w.(*os.File); ok {
		if n, _, err := term.GetSize(int(f.Fd())); err == nil && n > 0 {
			return min(n, most)
		}
	}
	return usual
}

// compared is a comparison for people.
func compared(c *spirt.Comparison, curves chart.Chart, columns int) string {
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(name string, values []string) {
		fmt.Fprintf(t, "  %s\t%s\n", short(name), strings.Join(values, "\t"))
	}
	cells := func(name string, value func(r *spirt.RunResult) string) {
		values, told := make([]string, len(c.Runs)), false
		for i := range c.Runs {
			values[i] = short(value(&c.Runs[i]))
			told = told || values[i] != "-"
		}
		if told {
			row(name, values)
		}
	}
	if len(c.Differences) == 0 {
		b.WriteString("Their jobs and machines do not differ.\n\n")
	}
	cells("", func(r *spirt.RunResult) string { return r.Name })
	for _, d := range c.Differences {
		values := make([]string, len(d.Values))
		for i, v := range d.Values {
			if values[i] = short(v); v == "" {
				values[i] = "-"
			}
		}
		row(d.Field, values)
	}
	fmt.Fprintln(t, strings.Repeat("\t", len(c.Runs))) // the columns go on
	cells("state", func(r *spirt.RunResult) string { return r.State })
	scored := func(on string) {
		cells(on+" accuracy", func(r *spirt.RunResult) string {
			if r.ScoredOn != on {
				return "-"
			}
			return percent(r.Accuracy)
		})
		cells(on+" loss", func(r *spirt.RunResult) string {
			if r.ScoredOn != on {
				return "-"
			}
			return number(r.Loss)
		})
	}
	scored("test")
	scored("validation")
	cells("rounds", func(r *spirt.RunResult) string { return fmt.Sprint(r.Rounds) })
	cells("time", func(r *spirt.RunResult) string { return lasting(r.Seconds) })
	if c.Target > 0 {
		cells(fmt.Sprintf("until %.4g %%", 100*c.Target), func(r *spirt.RunResult) string {
			if r.Reached == nil {
				return "not reached"
			}
			return fmt.Sprintf("%s, round %d", lasting(r.Reached.Seconds), r.Reached.Round)
		})
	}
	cells("images/s", func(r *spirt.RunResult) string { return fmt.Sprintf("%.0f", r.SamplesPerSecond) })
	for i, step := range events.Steps {
		cells("time in "+step, func(r *spirt.RunResult) string {
			if len(r.Steps) == 0 || r.Steps[i].MS == 0 {
				return "-"
			}
			return fmt.Sprintf("%.1f %%", 100*r.Steps[i].Share)
		})
	}
	cells("invocations", func(r *spirt.RunResult) string { return fmt.Sprint(r.Invocations) })
	cells("of which failed", func(r *spirt.RunResult) string { return fmt.Sprint(r.Failed) })
	cells("functions", func(r *spirt.RunResult) string { return fmt.Sprintf("%.3f GB-s", r.GBSeconds) })
	cells("between peers", func(r *spirt.RunResult) string { return size(uint64(max(r.BytesOut, 0))) })
	cells("cost", func(r *spirt.RunResult) string {
		if r.TotalUSD == nil {
			return "-"
		}
		return r.TotalUSD.String()
	})
	causes := map[string]bool{}
	for _, r := range c.Runs {
		for cause := range r.Faults {
			causes[cause] = true
		}
	}
	for _, cause := range slices.Sorted(maps.Keys(causes)) {
		cells("faults: "+cause, func(r *spirt.RunResult) string { return fmt.Sprint(r.Faults[cause]) })
	}
	cells("lines not read", func(r *spirt.RunResult) string {
		if r.Skipped == 0 {
			return "-"
		}
		return fmt.Sprint(r.Skipped)
	})
	t.Flush()
	lines := strings.Split(b.String(), "\n")
	for i, l := range lines {
		lines[i] = strings.TrimRight(l, " ")
	}
	b.Reset()
	b.WriteString(strings.Join(lines, "\n") + "\n" + curves.Text(columns, 10) + "\n")
	for i, r := range c.Runs {
		fmt.Fprintf(&b, "  %c %s\n", "123456789abcdefghijklmnopqrstuvwxyz"[i], short(r.Name))
	}
	return b.String()
}
