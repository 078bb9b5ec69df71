package function

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// ServeConfig says where to serve the Invoke API.
type ServeConfig struct {
	Listen string         // host:port; empty: 127.0.0.1:0
	Public bool           // allow an address that other machines reach: whoever reaches it may run the function
	Ready  func(net.Addr) // is told the address before the first call is answered; nil: nobody is
}

// Serve makes a platform of c and answers the Invoke API for it until ctx ends. Then it lets calls under way end, for at
// most five seconds, closes the platform and returns nil.
func Serve(ctx context.Context, c Config, s ServeConfig) error {
	if s.Listen == "" {
		s.Listen = "127.0.0.1:0"
	}
	p, err := New(c)
	if err != nil {
		return err
	}
	defer p.Close()
	listener, err := net.Listen("tcp", s.Listen)
	if err != nil {
		return fmt.Errorf("serving the Invoke API on %q: %w: choose a free address such as 127.0.0.1:0", s.Listen, err)
	}
	if at, err := netip.ParseAddrPort(listener.Addr().String()); !s.Public && (err != nil || !at.Addr().Unmap().IsLoopback()) {
		listener.Close()
		return fmt.Errorf("serving the Invoke API on %q: whoever reaches that address could run the function: listen on 127.0.0.1", s.Listen)
	}
	p.log.Info("serving the Invoke API", "endpoint", "http://"+listener.Addr().String())
	server := &http.Server{
		Handler:           p.InvokeHandler(),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       time.Minute,
		WriteTimeout:      p.cfg.InitTimeout + p.cfg.Timeout + time.Minute, // of a cold invocation and its answer
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
	}
	if s.Ready != nil {
		s.Ready(listener.Addr())
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("serving the Invoke API: %w", err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := server.Shutdown(grace); err != nil {
		server.Close()
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving the Invoke API: %w", err)
	}
	return nil
}
