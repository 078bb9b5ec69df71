package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt/bill"
)

func pricesCommand(stdout io.Writer) *cobra.Command {
	var write string
	var asJSON bool
	c := &cobra.Command{
		Use:   "prices [NAME|FILE]",
		Short: "List the tables of prices, or write one to edit",
		Long: "Prices lists the tables of prices that spirt train, bill and plan take by name (--prices),\n" +
			"shows one of them or a file of yours, or writes one to a file for you to edit.\n" +
			"docs/bill.md says what is counted.",
		Example: "  spirt prices\n  spirt prices --write prices.yaml aws-arm64\n  spirt prices prices.yaml     # checks it",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if write != "" && asJSON {
				return usage(errors.New("--write and --json: take one"))
			}
			tables := bill.Tables()
			if len(args) == 1 {
				t, err := bill.Open(args[0])
				if err != nil {
					return usage(err)
				}
				tables = []*bill.Table{t}
			}
			switch {
			case write != "" && len(args) == 0:
				return usage(errors.New("--write needs the name of a table, such as aws-arm64 (see `spirt prices`)"))
			case write != "":
				if err := bill.Write(write, tables[0]); err != nil {
					return usage(err)
				}
				_, err := fmt.Fprintf(stdout, "%s written: edit it, and give it to spirt train, bill or plan by --prices %s\n", write, write)
				return err
			case asJSON && len(args) == 1:
				return json.NewEncoder(stdout).Encode(tables[0])
			case asJSON:
				return json.NewEncoder(stdout).Encode(tables)
			case len(args) == 1:
				_, err := stdout.Write(tables[0].YAML())
				return err
			}
			return listPrices(stdout, tables)
		},
	}
	c.Flags().StringVar(&write, "write", "", "write the table to this new file")
	c.Flags().BoolVar(&asJSON, "json", false, "write JSON")
	return c
}

func listPrices(w io.Writer, tables []*bill.Table) error {
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "name\tof\tGB-second\ta million requests\tpeer-hour\tdatabase-hour\tGB between peers\t")
	for _, p := range tables {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t\n", p.Name, p.Date, dollars(p.GBSecond), dollars(1e6*p.Request), dollars(p.PeerHour), dollars(p.DBHour), dollars(p.GBOut))
	}
	t.Flush()
	for _, p := range tables {
		fmt.Fprintf(&b, "\n%s: %s\n  %s\n", p.Name, p.Notes, p.Source)
	}
	fmt.Fprintf(&b, "\nThe default is %s. Tables of your own: spirt prices --write prices.yaml %s\n", bill.DefaultName, bill.DefaultName)
	_, err := io.WriteString(w, b.String())
	return err
}

// dollars is an exact amount, as prices are told.
func dollars(m bill.Money) string { return "$" + m.Decimal() }
