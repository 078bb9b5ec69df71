package main

import (
	"bufio"
	"cmp"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/events"
	"github.com/spirt-ml/spirt/tensorboard"
)

// boardFolder holds the event files of a run in its folder.
const boardFolder = "tensorboard"

func exportCommand(stdout io.Writer) *cobra.Command {
	var board, table string
	c := &cobra.Command{
		Use:   "export RUN",
		Short: "Write the curves of a run for TensorBoard, or as CSV",
		Long: "Export reads the events of a run folder, also while its peers run, and writes the curves so\n" +
			"far: as an event file for TensorBoard into a folder, and as a table with a line for each round.\n" +
			"docs/metrics.md has the names. `spirt train --tensorboard` writes while it trains.",
		Example: "  spirt export runs/mine --tensorboard boards/mine && tensorboard --logdir boards\n" +
			"  spirt export runs/mine --csv mine.csv\n  spirt export runs/mine --csv - | head",
		Args: exactly(1, "a run folder"),
		RunE: func(c *cobra.Command, args []string) error {
			if board == "" && table == "" {
				return usage(errors.New("export needs --tensorboard FOLDER, --csv FILE or both"))
			}
			if board != "" {
				has, err := tensorboard.Has(board)
				if err != nil {
					return err
				}
				if has {
					return usage(fmt.Errorf("--tensorboard %s: it has event files already, and TensorBoard would mix them with these: name another folder", board))
				}
			}
			if _, err := os.Lstat(table); table != "" && table != "-" && err == nil {
				return usage(fmt.Errorf("--csv %s: it exists: name another file, or remove it", table))
			}
			tail, err := spirt.EventsOf(args[0])
			if errors.Is(err, fs.ErrNotExist) {
				err = usage(fmt.Errorf("%s is no run folder: `spirt runs` lists those there are", args[0]))
			}
			if err != nil {
				return err
			}
			defer tail.Close()
			var w *tensorboard.Writer
			if board != "" {
				if w, err = tensorboard.Create(board); err != nil {
					return err
				}
			}
			var failed error
			rounds := roundTable{}
			err = tail.Each(func(e *events.Event) {
				if w != nil && failed == nil {
					failed = w.Add(e)
				}
				if table != "" {
					rounds.add(e)
				}
			})
			if w != nil {
				failed = cmp.Or(w.Close(), failed)
			}
			if err = cmp.Or(err, failed); err != nil || table == "" {
				return err
			}
			if table == "-" {
				return rounds.write(stdout)
			}
			f, err := os.OpenFile(table, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
			if err != nil {
				return err
			}
			return errors.Join(rounds.write(f), f.Close())
		},
	}
	c.Flags().StringVar(&board, "tensorboard", "", "folder to write an event file for TensorBoard into; it is made if need be")
	c.Flags().StringVar(&table, "csv", "", "file to write a table of the rounds into, which must not exist; - is standard output")
	return c
}

// roundTable has what is known of each round. It is as large as the log says
// that the run is long.
type roundTable map[uint64]*roundRow

type roundRow struct {
	sum                      events.RoundSum
	trained                  bool // some peer has told of the round itself
	accuracy, validationLoss *float64
}

func (t roundTable) add(e *events.Event) {
	if e.Round == 0 || e.Event != "round" && e.Event != "validation" {
		return
	}
	r := t[e.Round]
	if r == nil {
		r = &roundRow{}
		t[e.Round] = r
	}
	if e.Event == "round" {
		r.sum.Add(e)
		r.trained = true
		return
	}
	r.accuracy, r.validationLoss = e.Accuracy, e.Loss
}

// write writes the rounds, ascending. What is not known of one is empty.
func (t roundTable) write(to io.Writer) error {
	b := bufio.NewWriter(to)
	w := csv.NewWriter(b)
	number := func(v *float64) string {
		if v == nil {
			return ""
		}
		return strconv.FormatFloat(*v, 'g', -1, 64)
	}
	w.Write([]string{"round", "loss", "accuracy", "validation_loss", "seconds", "cost"})
	for _, n := range slices.Sorted(maps.Keys(t)) {
		r := t[n]
		var loss, seconds *float64
		cost := ""
		if l, ok := r.sum.Loss(); ok {
			loss = &l
		}
		if r.trained {
			s := r.sum.Seconds()
			seconds, cost = &s, r.sum.Cost.Decimal()
		}
		w.Write([]string{strconv.FormatUint(n, 10), number(loss), number(r.accuracy), number(r.validationLoss), number(seconds), cost})
	}
	w.Flush()
	return cmp.Or(w.Error(), b.Flush())
}

// trainTensorBoard has a run written for TensorBoard into its folder, until stop. The
// run goes on also where that is not possible.
func trainTensorBoard(cfg *spirt.TrainConfig, say func(format string, args ...any)) (stop func()) {
	var w *tensorboard.Writer
	var failed bool
	note := func(err error) {
		if err != nil && !failed {
			failed = true
			say("TensorBoard gets no more of this run: %v", err)
		}
	}
	before := cfg.OnEvent
	cfg.OnEvent = func(e spirt.Event, line []byte) {
		before(e, line)
		if w == nil && !failed { // the run folder is there by now
			var err error
			w, err = tensorboard.Create(filepath.Join(cfg.Dir, boardFolder))
			note(err)
		}
		if w != nil && !failed {
			note(w.Add(&e))
		}
	}
	return func() {
		if w != nil {
			note(w.Close())
		}
	}
}
