package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
)

// dearest is how many rounds a bill lists when not told.
const dearest = 5

func billCommand(stdout io.Writer) *cobra.Command {
	var prices string
	var rounds, asJSON, asCSV bool
	c := &cobra.Command{
		Use:   "bill RUN",
		Short: "What a run cost, and what for",
		Long: "Bill adds up what a run used, from its events: by kind, by peer and by round, with failed\n" +
			"attempts and cold starts. It checks what the peers reckoned, and says where it differs.\n" +
			"The prices are those of the run, or others by --prices. docs/bill.md says what is counted.",
		Example: "  spirt bill runs/mine\n  spirt bill runs/mine --rounds\n  spirt bill runs/mine --prices aws-x86_64 --json\n  spirt bill runs/mine --csv > bill.csv",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage(errors.New("bill needs a run folder (see `spirt bill --help`)"))
			}
			if asJSON && (asCSV || rounds) || asCSV && rounds {
				return usage(errors.New("--rounds, --json and --csv: take one; JSON and CSV have every round"))
			}
			own, err := spirt.PricesOf(args[0])
			if err != nil {
				return err
			}
			table := own
			if prices != "" {
				if table, err = bill.Open(prices); err != nil {
					return usage(err)
				}
			}
			s, skipped, err := readBill(args[0], own, table)
			if err != nil {
				return err
			}
			switch {
			case asJSON:
				return json.NewEncoder(stdout).Encode(struct {
					*events.Statement
					Skipped int `json:"unreadable_lines"`
				}{s, skipped})
			case asCSV:
				return s.WriteCSV(stdout)
			}
			_, err = io.WriteString(stdout, statement(args[0], s, skipped, rounds))
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&prices, "prices", "", "price the run anew: a name of `spirt prices`, or a file (default the run's own prices)")
	f.BoolVar(&rounds, "rounds", false, "list every round")
	f.BoolVar(&asJSON, "json", false, "write one JSON object")
	f.BoolVar(&asCSV, "csv", false, "write a line of comma-separated values for each round")
	return c
}

// readBill folds the events of a run, whose peers had their own table.
func readBill(dir string, own, table *bill.Table) (s *events.Statement, skipped int, err error) {
	tail, err := spirt.EventsOf(dir)
	if err != nil {
		return nil, 0, usage(fmt.Errorf("the events of the run cannot be read: %w", err))
	}
	defer tail.Close()
	b := events.Bill{Own: own}
	if err := tail.Each(b.Add); err != nil {
		return nil, 0, fmt.Errorf("the events of the run cannot be read: %w", err)
	}
	return b.Statement(table), tail.Skipped(), nil
}

// statement is a bill for people.
func statement(run string, s *events.Statement, skipped int, rounds bool) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %v, at the prices %s of %s\n\n", clean(run), s.TotalUSD, clean(s.Prices.Name), s.Prices.Date)
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	c, u := s.Cost, s.Usage
	fmt.Fprintf(t, "  functions\t%v\t%.3f GB-s\n", c.Functions, u.GBSeconds())
	fmt.Fprintf(t, "  requests\t%v\t%s\n", c.Requests, plural(int(u.Invocations), "invocation"))
	fmt.Fprintf(t, "  peers\t%v\t%s\n", c.Peers, lasting(float64(u.PeerMillis)/1e3))
	fmt.Fprintf(t, "  databases\t%v\t%s\n", c.Databases, lasting(float64(u.DBMillis)/1e3))
	fmt.Fprintf(t, "  transfer\t%v\t%s\n", c.Transfer, size(uint64(max(u.BytesOut, 0))))
	fmt.Fprintln(t)
	for _, k := range s.Tasks {
		fmt.Fprintf(t, "  %s\t%v\t%s, %.3f GB-s\n", clean(k.Name), k.TotalUSD, plural(int(k.Usage.Invocations), "invocation"), k.Usage.GBSeconds())
	}
	if s.Cold.Invocations > 0 {
		fmt.Fprintf(t, "  of which cold starts\t%v\t%d, %.0f ms to start one\n", s.ColdUSD, s.Cold.Invocations, s.Cold.InitMS/float64(s.Cold.Invocations))
	}
	fmt.Fprintf(t, "  of which failed\t%v\t%s\n", s.Failed.TotalUSD, plural(int(s.Failed.Usage.Invocations), "attempt"))
	for _, k := range s.Failures {
		fmt.Fprintf(t, "    %s\t%v\t%d\n", clean(k.Name), k.TotalUSD, k.Usage.Invocations)
	}
	fmt.Fprintln(t)
	for _, p := range s.Peers {
		fmt.Fprintf(t, "  peer %d\t%v\t%s, %s, %.3f GB-s, %s out\n", p.Peer, p.TotalUSD, plural(p.Rounds, "round"),
			plural(int(p.Usage.Invocations), "invocation"), p.Usage.GBSeconds(), size(uint64(max(p.Usage.BytesOut, 0))))
	}
	fmt.Fprintln(t)
	if n := len(s.Rounds); n > 0 {
		line := func(name string, i events.Item) {
			fmt.Fprintf(t, "  %s\t%v\t%s, %.3f GB-s\n", name, i.TotalUSD, plural(int(i.Usage.Invocations), "invocation"), i.Usage.GBSeconds())
		}
		if rounds {
			for _, r := range s.Rounds {
				line(fmt.Sprintf("round %d", r.Round), r.Item)
			}
		} else {
			line(fmt.Sprintf("round %d, the first", s.Rounds[0].Round), s.Rounds[0].Item)
			line(fmt.Sprintf("round %d, the last", s.Rounds[n-1].Round), s.Rounds[n-1].Item)
			for _, r := range s.Dearest(min(dearest, n-1)) {
				line(fmt.Sprintf("round %d, among the dearest", r.Round), r.Item)
			}
		}
		line(fmt.Sprintf("mean of %s", plural(n, "round")), s.Mean)
		for _, r := range []struct {
			name string
			item events.Item
		}{{"further rounds", s.Further}, {"before peers were started again", s.Abandoned}, {"after the last rounds", s.Rest}} {
			if r.item.Usage != (bill.Usage{}) {
				line(r.name, r.item)
			}
		}
	}
	t.Flush()
	if s.PaidUSD != nil {
		fmt.Fprintf(&b, "\nThe run itself reckoned %v.\n", *s.PaidUSD)
	}
	if s.Differ > 0 {
		fmt.Fprintf(&b, "\nIn %s a peer told another thing than its invocations add up to:\n", plural(s.Differ, "round"))
		for _, d := range s.Differences {
			if d.Told == d.Counted {
				fmt.Fprintf(&b, "  peer %d, round %d: told %v, that is %v at the run's prices\n", d.Peer, d.Round, d.ToldUSD, d.CountedUSD)
				continue
			}
			fmt.Fprintf(&b, "  peer %d, round %d: told %s of %d MB-ms, counted %s of %d MB-ms\n", d.Peer, d.Round,
				plural(int(d.Told.Invocations), "invocation"), d.Told.MBMillis, plural(int(d.Counted.Invocations), "invocation"), d.Counted.MBMillis)
		}
		if more := s.Differ - len(s.Differences); more > 0 {
			fmt.Fprintf(&b, "  and %d more\n", more)
		}
	}
	if skipped > 0 {
		fmt.Fprintf(&b, "\n%s could not be read and what they told is not in the bill.\n", plural(skipped, "line"))
	}
	if s.Implausible > 0 {
		fmt.Fprintf(&b, "\n%s told what cannot be, which is not in the bill.\n", plural(s.Implausible, "event"))
	}
	return b.String()
}

// lasting is a time for people.
func lasting(seconds float64) string {
	switch {
	case seconds >= 7200:
		return fmt.Sprintf("%.1f h", seconds/3600)
	case seconds >= 120:
		return fmt.Sprintf("%.1f min", seconds/60)
	}
	return fmt.Sprintf("%.1f s", seconds)
}
