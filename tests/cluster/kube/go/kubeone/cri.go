package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// cri asks the container runtime for what bringing a cluster up and down needs:
//
//	cri ENDPOINT version   is it there?
//	cri ENDPOINT clean     stop and remove every pod
func cri() int {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: cri ENDPOINT version|clean")
		return 2
	}
	if err := criCall(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "cri:", err)
		return 1
	}
	return 0
}

func criCall(endpoint, verb string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := runtime.NewRuntimeServiceClient(conn)
	switch verb {
	case "version":
		version, err := client.Version(ctx, &runtime.VersionRequest{})
		if err == nil {
			fmt.Println(version.RuntimeName, version.RuntimeVersion)
		}
		return err
	case "clean":
		return removePods(ctx, client)
	}
	return fmt.Errorf("unknown verb %q", verb)
}

func removePods(ctx context.Context, client runtime.RuntimeServiceClient) error {
	pods, err := client.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	done := make(chan error, len(pods.Items))
	for _, pod := range pods.Items {
		go func() { done <- removePod(ctx, client, pod.Id) }()
	}
	var failed []error
	for range pods.Items {
		failed = append(failed, <-done)
	}
	return errors.Join(failed...)
}

func removePod(ctx context.Context, client runtime.RuntimeServiceClient, id string) error {
	if _, err := client.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return err
	}
	_, err := client.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}
