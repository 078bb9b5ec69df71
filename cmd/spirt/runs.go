package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt"
)

// runsFolder is where runs are made that are not told where.
const runsFolder = "runs"

func runsCommand(stdout io.Writer) *cobra.Command {
	by, asJSON := "started", false
	c := &cobra.Command{
		Use:   "runs [DIR]",
		Short: "List the runs of a folder, and how each went",
		Long: "Runs lists the run folders in a folder, by default " + runsFolder + ", the newest first. A run that is dead\n" +
			"should run, and no process does: `spirt train --resume` goes on with it.",
		Example: "  spirt runs\n  spirt runs experiments --sort accuracy\n  spirt runs --json",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			dir := runsFolder
			if len(args) == 1 {
				dir = args[0]
			}
			if err := spirt.SortRuns(nil, by); err != nil {
				return usage(err)
			}
			runs, left, err := spirt.ListRuns(dir)
			if errors.Is(err, fs.ErrNotExist) && len(args) == 0 {
				runs, err = []spirt.RunSummary{}, nil // there was no run yet
			}
			if err != nil {
				return legible(usage(fmt.Errorf("the runs cannot be listed: %w", err)))
			}
			if err := spirt.SortRuns(runs, by); err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(stdout).Encode(struct {
					Runs []spirt.RunSummary `json:"runs"`
					Left int                `json:"not_looked_at"`
				}{runs, left})
			}
			_, err = io.WriteString(stdout, listing(dir, runs, left))
			return err
		},
	}
	c.Flags().StringVar(&by, "sort", by, "what is listed first: the highest accuracy, the lowest loss, time or cost, or the last started")
	c.Flags().BoolVar(&asJSON, "json", false, "write one JSON object")
	return c
}

// listing is a table of runs for people.
func listing(dir string, runs []spirt.RunSummary, left int) string {
	if len(runs) == 0 && left == 0 {
		return fmt.Sprintf("no runs in %s: `spirt train` makes one\n", short(dir))
	}
	var b, notes strings.Builder
	validated := false
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tSTATE\tSTARTED\tMODEL\tPEERS\tROUNDS\tACCURACY\tLOSS\tTIME\tCOST\tSEED")
	for _, r := range runs {
		if r.Problem != "" {
			fmt.Fprintf(&notes, "%s: %s\n", short(r.Name), clean(r.Problem))
		}
		if r.State == "unreadable" {
			fmt.Fprintf(t, "%s\t%s\t-\t-\t-\t-\t-\t-\t-\t-\t-\n", short(r.Name), r.State)
			continue
		}
		started, cost, mark := "-", "-", ""
		if !r.Started.IsZero() {
			started = r.Started.Local().Format("2006-01-02 15:04")
		}
		if r.CostUSD != nil {
			cost = r.CostUSD.String()
		}
		if r.ScoredOn == "validation" {
			mark, validated = "*", true
		}
		accuracy, loss := percent(r.Accuracy), number(r.Loss)
		if r.Accuracy != nil {
			accuracy += mark
		} else if r.Loss != nil {
			loss += mark
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%d/%d\t%s\t%s\t%s\t%s\t%d\n", short(r.Name), short(r.State), started, short(r.Model),
			r.Peers, r.Rounds, r.Planned, accuracy, loss, lasting(r.Seconds), cost, r.Seed)
	}
	t.Flush()
	if validated {
		b.WriteString("\n* of the last validation: the run has no model that was tested\n")
	}
	if left > 0 {
		fmt.Fprintf(&notes, "%s has %d more entries than are looked at: list a smaller folder\n", short(dir), left)
	}
	if notes.Len() > 0 {
		b.WriteString("\n" + notes.String())
	}
	return b.String()
}

// short is a text of a file or a folder in a cell of a table.
func short(s string) string {
	const most = 48
	if r := []rune(clean(s[:min(len(s), 4*most)])); len(r) > most || len(s) > 4*most {
		return string(r[:min(len(r), most-1)]) + "…"
	}
	return clean(s)
}

// legible is an error without what a terminal obeys: folders may have any name.
func legible(err error) error {
	lines := strings.Split(err.Error(), "\n")
	for i, l := range lines {
		lines[i] = clean(l)
	}
	text := strings.Join(lines, "\n")
	var wrong *spirt.UsageError
	switch {
	case text == err.Error():
		return err
	case errors.As(err, &wrong):
		return usage(errors.New(text))
	}
	return errors.New(text)
}

// percent is a fraction for people, - if it is not known.
func percent(f *float64) string {
	if f == nil {
		return "-"
	}
	return fmt.Sprintf("%.2f %%", 100**f)
}

// number is any number for people, - if it is not known.
func number(f *float64) string {
	if f == nil {
		return "-"
	}
	return fmt.Sprintf("%.4g", *f)
}
