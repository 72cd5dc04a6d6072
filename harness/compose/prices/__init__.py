"""What a step costs on a device that was not measured: a model of it, fitted on the devices that were."""
