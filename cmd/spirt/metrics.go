package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/metrics"
)

func metricsCommand(stdout, stderr io.Writer) *cobra.Command {
	at, public, once := "127.0.0.1:9090", false, false
	c := &cobra.Command{
		Use:   "metrics RUN",
		Short: "Serve the metrics of a run to Prometheus, or print them",
		Long: "Metrics reads the events of a run folder, also while its peers run, and serves what they\n" +
			"tell at http://HOST:PORT/metrics until it is interrupted. docs/metrics.md has their names.",
		Example: "  spirt metrics runs/mine --listen 127.0.0.1:9090\n  spirt metrics runs/mine --print",
		Args:    exactly(1, "a run folder"),
		RunE: func(c *cobra.Command, args []string) error {
			tail, err := spirt.EventsOf(args[0])
			if err != nil {
				return err
			}
			defer tail.Close()
			prices, err := spirt.PricesOf(args[0])
			if err != nil {
				return err
			}
			run := metrics.New(prices)
			if err := tail.Each(run.Add); err != nil {
				return err
			}
			if once {
				families, err := run.Gatherer().Gather()
				if err != nil {
					return err
				}
				for _, f := range families {
					if _, err := expfmt.MetricFamilyToText(stdout, f); err != nil {
						return err
					}
				}
				return nil
			}
			if err := localOnly(at, public, "--public"); err != nil {
				return usage(err)
			}
			stop, addr, err := serveMetrics(at, run)
			if err != nil {
				return err
			}
			defer stop()
			fmt.Fprintf(stderr, "metrics at http://%s/metrics; end with Ctrl-C\n", addr)
			tick := time.NewTicker(time.Second)
			defer tick.Stop()
			for {
				select {
				case <-c.Context().Done():
					return nil
				case <-tick.C:
					if err := tail.Each(run.Add); err != nil {
						return err
					}
				}
			}
		},
	}
	c.Flags().StringVar(&at, "listen", at, "host:port to serve at; port 0 takes a free one")
	c.Flags().BoolVar(&public, "public", false, "allow an address other than loopback: whoever reaches it reads the metrics")
	c.Flags().BoolVar(&once, "print", false, "print the metrics as they are now and end")
	return c
}

// metricsFlags are those of a command that trains.
type metricsFlags struct {
	at     string
	public bool
}

func (m *metricsFlags) add(f *pflag.FlagSet) {
	f.StringVar(&m.at, "metrics", "", "host:port at which Prometheus finds the metrics of the run, such as 127.0.0.1:9090")
	f.BoolVar(&m.public, "metrics-public", false, "allow an address other than loopback for --metrics")
}

// train has a run's metrics served until stop. The run goes on also where
// that is not possible.
func (m *metricsFlags) train(cfg *spirt.TrainConfig, resumed bool, say func(format string, args ...any)) (stop func(), err error) {
	if err := localOnly(m.at, m.public, "--metrics-public"); err != nil {
		return nil, err
	}
	var run *metrics.Run
	if resumed {
		prices, err := spirt.PricesOf(cfg.Dir)
		if err != nil {
			return nil, err
		}
		run = metrics.New(prices)
		tail, err := spirt.EventsOf(cfg.Dir)
		if err != nil {
			return nil, err
		}
		defer tail.Close()
		if err := tail.Each(run.Add); err != nil { // counters go on where they were
			return nil, err
		}
	} else {
		prices, err := bill.Open(cmp.Or(cfg.Prices, bill.DefaultName))
		if err != nil {
			return nil, fmt.Errorf("prices: %w", err)
		}
		run = metrics.New(prices)
	}
	stop, addr, err := serveMetrics(m.at, run)
	if err != nil {
		say("no metrics are served: %v", err)
		return func() {}, nil
	}
	say("metrics at http://%s/metrics", addr)
	before := cfg.OnEvent
	cfg.OnEvent = func(e spirt.Event, line []byte) {
		before(e, line)
		run.Add(&e)
	}
	return stop, nil
}

// localOnly refuses an address that others reach, unless the flag allows it.
func localOnly(at string, public bool, flag string) error {
	host, _, err := net.SplitHostPort(at)
	if err != nil {
		return fmt.Errorf("%.100q is no host:port, such as 127.0.0.1:9090", at)
	}
	if public || loopback(host) {
		return nil
	}
	return fmt.Errorf("%s is not loopback: whoever reaches it reads the metrics; say %s if that is meant", at, flag)
}

// serveMetrics serves until stop is called, which waits.
func serveMetrics(at string, run *metrics.Run) (stop func(), addr net.Addr, err error) {
	l, err := net.Listen("tcp", at)
	if err != nil {
		return nil, nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", run.Handler())
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			l.Close()
		}
	}()
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if s.Shutdown(ctx) != nil {
			s.Close()
		}
		<-ended
	}, l.Addr(), nil
}
